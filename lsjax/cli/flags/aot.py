"""Compiles a run for TPUs or GPUs that need not be there: time and memory.

    lsjax aot --config configs/continual_llama2_7b.py --topology v5p:4x4x4
    lsjax aot --config configs/continual_llama2_7b.py --topology v5e:16x16 \\
        --mesh.data 8 --mesh.fsdp 32 --programs train --output report.json
    lsjax aot --config configs/continual_llama3_2_1b.py --topology h100:1 \\
        --programs prefill decode --decoding.strategy autoregressive

Needs the chip's compiler (pip install 'lsjax[tpu]' or 'lsjax[cuda]'). Compiling may take minutes.
Any field of the configuration is a flag, as in train.py. docs/pods.md explains the figures.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from lsjax.cli.flags.config_file import ConfigFields, ConfigFile, parse_config
from lsjax.cli.flags.parse import Program
from lsjax.config import AnyPath, DecodingShape, MeshConfig, check
from lsjax.interrupts import importing

ProgramName = Literal["train", "evaluate", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Slice(ConfigFile):
    """The slice to compile for."""

    topology: str | None = None
    """Chip and slice: v5e:8x8, v5p:4x4x4, v6e:16x16, h100:8, a100:8, l4:1, rtx4090:1."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Slice):
    """Programs to compile, and the slice to compile for."""

    fields: ConfigFields
    programs: tuple[ProgramName, ...] = get_args(ProgramName)
    """Programs to compile: a training step, the scoring of a batch at every exit, the prefill of a
    prompt, a round of decoding."""
    beside_plain: bool = False
    """Also compiles the step without layer dropout and exits, for comparison."""
    decoding: DecodingShape = DecodingShape()
    decoding_mesh: MeshConfig = MeshConfig(tensor=4)
    """Devices that decode; by default four, or all of a smaller slice."""
    output: AnyPath | None = None
    """Writes a JSON object with all figures to this file."""


def default_mesh(found: Slice) -> dict[str, MeshConfig]:
    """The devices that decode by default."""
    with importing():  # jax
        from lsjax.aot.chips import slice_size

    check(found.topology is not None, "--topology is missing: name a slice such as v5p:4x4x4")
    return {"decoding_mesh": MeshConfig(tensor=min(4, slice_size(found.topology)))}


PROGRAM = Program(
    "aot",
    "lsjax.cli.aot:report",
    Arguments,
    __doc__,
    common="""
        config topology programs beside_plain batch_size seq_len micro_batches remat mesh.data
        mesh.fsdp mesh.tensor decoding.batch_size decoding.prompt_tokens decoding.strategy
        decoding.exit_layer decoding.num_draft_tokens decoding_mesh.tensor output
    """,
    usage="--config FILE --topology SLICE",
    parse=partial(parse_config, early=Slice, derived=default_mesh),
)
