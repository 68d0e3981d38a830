"""Compiles a run for TPUs or GPUs on a machine without them, and reports its time and memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, get_args

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from lsjax.aot import decoding, programs
from lsjax.aot.chips import slice_of
from lsjax.aot.programs import Counted
from lsjax.aot.remat import AUTO, fastest
from lsjax.cli.aot_tables import print_report
from lsjax.cli.flags.aot import Arguments, ProgramName
from lsjax.cli.notes import notes_console
from lsjax.cli.setup import check_output
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, check
from lsjax.evaluation.exits import exit_sums
from lsjax.io.files import writing
from lsjax.sharding import make_mesh
from lsjax.training.profiling import exit_flops, step_flops


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
            "plain_flops": step_flops(shape, rows, length, config.lora, config.exit_blocks),
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
            for kind in decoding.kinds_of_rounds(shape, model)
        ]
        found.append(Program(name, mesh, program, counted))
    return found
