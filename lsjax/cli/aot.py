"""Compiles a run for TPUs or GPUs on a machine without them, and reports its time and memory.

    python -m lsjax.cli.aot --config configs/continual_llama2_7b.py --topology v5p:4x4x4
    python -m lsjax.cli.aot --config configs/continual_llama2_7b.py --topology v5e:16x16 \\
        --mesh.data 8 --mesh.fsdp 32 --programs train --output report.json
    python -m lsjax.cli.aot --config configs/continual_llama3_2_1b.py --topology h100:1 \\
        --programs prefill decode --decoding.strategy autoregressive

Needs the chip's compiler (pip install 'lsjax[tpu]' or 'lsjax[cuda]'). Compiling may take minutes.
Any field of the configuration is a flag, as in train.py. docs/pods.md explains the figures.
"""

from lsjax.interrupts import run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.aot")

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from lsjax.aot import decoding, programs
from lsjax.aot.chips import slice_of, slice_size
from lsjax.aot.decoding import DecodingShape
from lsjax.aot.programs import Counted
from lsjax.aot.remat import AUTO, fastest
from lsjax.cli.aot_tables import print_report
from lsjax.cli.setup import check_output, program
from lsjax.cli.show import notes_console
from lsjax.cli.training import ConfigFields, ConfigFile, parse_config
from lsjax.config import AnyPath, EarlyExitConfig, LayerDropoutConfig, MeshConfig, check
from lsjax.evaluation.exits import exit_sums
from lsjax.io.files import writing
from lsjax.sharding import make_mesh
from lsjax.training.profiling import exit_flops, step_flops

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
    check(found.topology is not None, "--topology is missing: name a slice such as v5p:4x4x4")
    return {"decoding_mesh": MeshConfig(tensor=min(4, slice_size(found.topology)))}


def report(arguments: Arguments) -> int:
    """Compiles the programs and prints the tables. Returns 1 if a program is too large.

    Raises ConfigError before compiling if the settings do not fit.
    """
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed
    # Without the chip, JAX can write its programs to the cache but cannot read them.
    jax.config.update("jax_enable_compilation_cache", False)
    config, shape = arguments.fields, arguments.fields.model
    check(shape is not None, "the configuration has no model: set `model`, which gives the shape")
    known = get_args(ProgramName)
    check(bool(arguments.programs), f"--programs is empty: choose from {', '.join(known)}")
    if arguments.output is not None:
        check_output(arguments.output)
    chip, devices = slice_of(arguments.topology, config.mesh.slices)
    if config.remat == AUTO and "train" in arguments.programs:
        config = fastest(config, make_mesh(config.mesh, devices), chip, notes_console().print)
        arguments = replace(arguments, fields=config)
    names = [name for name in known if name in arguments.programs]
    if "train" in names and arguments.beside_plain:
        names.insert(1, "plain")
    # All programs are lowered first, so that errors come before the slow compilation.
    begun = [one for name in names for one in lowered(name, arguments, devices)]
    meshes = {one.name: programs.sizes_by_slice(one.mesh) for one in begun}
    reports = []
    for one in begun:
        with notes_console().status(f"compiling {one.name} for {arguments.topology}"):
            reports += programs.program_reports(
                one.name, one.lowered, one.counted, chip, meshes[one.name]
            )
    rows, length = config.batch_size, config.seq_len
    trained_on = math.prod(meshes.get("train", {}).values())
    found = {
        "topology": arguments.topology,
        "kernels": config.kernels,
        "meshes": meshes,
        "training": {
            "devices": trained_on,
            "batch_size": rows,
            "micro_batches": config.micro_batches,
            "seq_len": length,
            "remat": config.remat,
            "plain_flops": step_flops(shape, rows, length, config.lora),
            "exit_flops": exit_flops(config.early_exit, shape, rows * length, config.num_steps),
            "peak_flops": chip.peak_flops * trained_on,
        },
        "decoding": asdict(arguments.decoding),
        "programs": reports,
    }
    print_report(found)
    if arguments.output is not None:
        with writing(arguments.output):
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(one["too_large"] for one in reports))


class Program(NamedTuple):
    """A program that is ready to be compiled."""

    name: str
    mesh: Mesh
    lowered: Lowered
    counted: list[Counted]


def lowered(name: str, arguments: Arguments, devices: Sequence[Any]) -> list[Program]:
    """The programs of a name: one for each number of rows that decode."""
    config = arguments.fields
    if name in ("prefill", "decode"):
        return decoding_programs(name, arguments)
    if name == "plain":
        config = replace(config, layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig())
    mesh = make_mesh(config.mesh, devices)
    if name == "evaluate":
        program, trips = programs.evaluation(config, mesh, exit_sums)
    else:
        program, trips = programs.train_step(config, mesh)
    return [Program(name, mesh, program, [(None, trips)])]


def decoding_programs(name: str, arguments: Arguments) -> list[Program]:
    """The prefill, or the decoding loop for each number of rows."""
    model, shape, kernels = arguments.fields.model, arguments.decoding, arguments.fields.kernels
    arguments.decoding_mesh.check_decoding()
    chip, devices = slice_of(arguments.topology)
    mesh = make_mesh(arguments.decoding_mesh, devices)
    if name == "prefill":
        program, trips = decoding.prefill_program(model, shape, mesh, kernels=kernels)
        return [Program(name, mesh, program, [(None, trips)])]
    found = []
    for rows in shape.batch_size:
        program = decoding.decode_program(model, shape, rows, mesh, kernels=kernels)
        counted = [
            (
                decoding.round_figures(model, shape, rows, kind, mesh, chip),
                decoding.round_trips(model, shape, kind),
            )
            for kind in shape.rounds(model)
        ]
        found.append(Program(name, mesh, program, counted))
    return found


parse = partial(parse_config, early=Slice, derived=default_mesh)
main = program(Arguments, report, __doc__, parse)
