"""Compiles a run for TPUs or GPUs, on a machine without them, and says what it needs there.

    python -m lsjax.cli.aot --config configs/continual_llama2_7b.py --topology v5p:4x4x4
    python -m lsjax.cli.aot --config configs/continual_llama2_7b.py --topology v5e:16x16 \\
        --mesh.data 8 --mesh.fsdp 32 --programs train --output report.json
    python -m lsjax.cli.aot --config configs/continual_llama3_2_1b.py --topology h100:1 \\
        --programs prefill decode --decoding.strategy autoregressive

Needs the chip's compiler (pip install 'lsjax[tpu]' or 'lsjax[cuda]') and a minute or more for each
program. Any field of the configuration is a flag, as for train.py. docs/pods.md says what the
figures mean.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh
from rich.console import Console

from lsjax.aot.chips import Chip, slice_of, slice_size
from lsjax.aot.needs import round_needs
from lsjax.aot.programs import Decoding, decoding, evaluation, train_step
from lsjax.aot.report import Report, compile_report
from lsjax.cli.aot_show import collectives_table, programs_table, round_lines, training_lines
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.training import config_parser, read_config
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, MeshConfig, TrainConfig, check
from lsjax.sharding import make_mesh
from lsjax.training.flops import exit_flops, step_flops

Program = Literal["train", "evaluate", "prefill", "decode"]
TRAINING = {"train", "evaluate"}  # on the configuration's mesh


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is compiled, and for what."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    topology: str
    """Chip and slice: v5e:8x8, v5p:4x4x4, v6e:16x16, h100:1, h100:8."""
    programs: tuple[Program, ...] = get_args(Program)
    """What to compile: the training step, the scoring of a batch at every exit, the reading of a
    prompt, a round of decoding."""
    beside_plain: bool = False
    """Compile the step without layer dropout and exits too, and compare."""
    decoding: Decoding = Decoding()
    decoding_mesh: MeshConfig = MeshConfig(tensor=4)
    """Devices that decode: four, or all of a smaller slice."""
    output: Path | None = None
    """Writes a JSON object with all figures to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        found = report(parse(sys.argv[1:] if argv is None else argv))
    return 1 if any(program["too_large"] for program in found["programs"]) else 0


def parse(argv: Sequence[str]) -> Arguments:
    """Raises ConfigError for what is wrong with the configuration or the flags."""
    parser = config_parser("python -m lsjax.cli.aot", __doc__)
    parser.add_argument("--topology", metavar="CHIP:SLICE", help="such as v5p:4x4x4")
    known, default, rest = read_config(parser, argv)
    check(known.topology is not None, "--topology is missing: name a slice such as v5p:4x4x4")
    return parse_flags(
        Arguments,
        rest,
        __doc__,
        default=Arguments(
            config=default,
            topology=known.topology,
            decoding_mesh=MeshConfig(tensor=min(4, slice_size(known.topology))),
        ),
        config=(tyro.conf.AvoidSubcommands,),
    )


def report(arguments: Arguments) -> dict[str, Any]:
    """Compiles, prints, and gives all figures.

    Raises ConfigError for what does not fit, before anything is compiled.
    """
    jax.config.update("jax_platforms", "cpu")  # for the shapes alone
    # Without a chip jax can write programs for it to the cache, but not read them.
    jax.config.update("jax_enable_compilation_cache", False)
    config, asked = arguments.config, arguments.programs
    check(config.model is not None, "the configuration has no model, whose shape is needed here")
    check(bool(asked), f"--programs is empty: choose from {', '.join(get_args(Program))}")
    if arguments.output is not None:
        check_output(arguments.output)
    chip, devices = slice_of(arguments.topology)
    lowered, needs = {}, {}
    if TRAINING & {*asked}:
        mesh = make_mesh(config.mesh, devices)
    if "train" in asked:
        lowered["train"] = mesh, *train_step(config, mesh)
        if arguments.beside_plain:
            lowered["plain"] = mesh, *train_step(without_layerskip(config), mesh)
    if "evaluate" in asked:
        lowered["evaluate"] = mesh, *evaluation(config, mesh)
    if {"prefill", "decode"} & {*asked}:
        few = make_mesh(arguments.decoding_mesh, devices)
        programs = decoding(config.model, arguments.decoding, few)
        lowered |= {name: (few, *program) for name, program in programs.items() if name in asked}
        needs["decode"] = round_needs(config.model, arguments.decoding, few, jnp.bfloat16)

    people = Console(highlight=False, soft_wrap=True)
    notes = Console(stderr=True)
    reports: list[Report] = []
    for name, (place, program, trips) in lowered.items():
        with notes.status(f"compiling {name} for {arguments.topology}"):
            sizes = dict(place.shape)
            reports.append(compile_report(name, program, trips, chip, sizes, needs.get(name)))
    people.print(title(arguments, chip, next(iter(lowered.values()))[0]))
    people.print(programs_table(reports))
    found = figures(arguments, chip, {name: dict(m.shape) for name, (m, *_) in lowered.items()})
    found["programs"] = [one.to_json() for one in reports]
    for one in reports:
        if one.name == "train":
            people.print(training_lines(one, reports, found["training"]), markup=False)
        if one.name == "decode" and one.memory is not None:
            people.print(round_lines(one.round_json(), arguments.decoding.strategy))
        if one.costs.collectives:
            people.print(collectives_table(one))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return found


def without_layerskip(config: TrainConfig) -> TrainConfig:
    """Plain training: no layer dropout, the last exit alone."""
    return replace(config, layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig())


def figures(
    arguments: Arguments, chip: Chip, meshes: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """All that is known without the compiler."""
    config, shape = arguments.config, arguments.config.model
    devices = math.prod(meshes.get("train", {}).values())
    tokens = config.batch_size * config.seq_len
    plain = step_flops(shape, config.batch_size, config.seq_len, config.lora)
    return {
        "topology": arguments.topology,
        "chip": chip.to_json(),
        "meshes": {name: dict(mesh) for name, mesh in meshes.items()},
        "training": {
            "devices": devices,
            "batch_size": config.batch_size,
            "micro_batches": config.micro_batches,
            "seq_len": config.seq_len,
            "remat": config.remat,
            "plain_flops": plain,
            "exit_flops": exit_flops(config.early_exit, shape, tokens, config.num_steps),
            "peak_flops": chip.peak_flops * devices,
        },
        "decoding": asdict(arguments.decoding),
    }


def title(arguments: Arguments, chip: Chip, mesh: Mesh) -> str:
    """What was compiled."""
    config = arguments.config
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    found = (
        f"{config.model.num_params / 1e9:.2f}B parameters on {mesh.size} of {chip.name} "
        f"({sizes or 'one device'})"
    )
    if not TRAINING & {*arguments.programs}:
        return found
    return (
        f"{found}; training with {config.batch_size} x {config.seq_len} tokens in "
        f"{config.micro_batches} micro-batches, remat {config.remat}"
    )


if __name__ == "__main__":
    sys.exit(main())
