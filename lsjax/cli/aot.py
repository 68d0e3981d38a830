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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh
from jax.stages import Lowered
from rich.table import Table

from lsjax.aot import programs
from lsjax.aot.chips import GIB, slice_of, slice_size
from lsjax.aot.costs import SLICES, Trips
from lsjax.aot.programs import DecodingShape
from lsjax.cli.setup import check_output, program
from lsjax.cli.show import notes_console, table, wide_console
from lsjax.cli.training import ConfigFields, ConfigFile, parse_config
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, MeshConfig, Path, check
from lsjax.data.files import writing
from lsjax.evaluation.exits import exit_sums
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
    output: Path | None = None
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
    names = [name for name in known if name in arguments.programs]
    if "train" in names and arguments.beside_plain:
        names.insert(1, "plain")
    # All programs are lowered first, so that errors come before the slow compilation.
    begun = {name: lowered(name, arguments, devices) for name in names}
    meshes = {name: sizes_by_slice(mesh) for name, (mesh, *_) in begun.items()}
    reports = []
    for name, (mesh, *ready) in begun.items():
        decodes = name == "decode"
        reads = programs.round_reads(shape, arguments.decoding, mesh) if decodes else None
        with notes_console().status(f"compiling {name} for {arguments.topology}"):
            reports.append(programs.program_report(name, *ready, chip, meshes[name], reads))
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


def lowered(name: str, arguments: Arguments, devices: Sequence[Any]) -> tuple[Mesh, Lowered, Trips]:
    """Mesh, lowered program and loop trips."""
    config = arguments.fields
    if name in ("prefill", "decode"):
        arguments.decoding_mesh.check_decoding()
        mesh = make_mesh(arguments.decoding_mesh, slice_of(arguments.topology)[1])
        given = name, config.model, arguments.decoding, mesh
        return mesh, *programs.decoding(*given, kernels=config.kernels)
    if name == "plain":
        config = replace(config, layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig())
    mesh = make_mesh(config.mesh, devices)
    if name == "evaluate":
        return mesh, *programs.evaluation(config, mesh, exit_sums)
    return mesh, *programs.train_step(config, mesh)


def sizes_by_slice(mesh: Mesh) -> dict[str, int]:
    """Sizes of a mesh's axes. Several slices are an axis of their own, the first."""
    sizes = dict(mesh.shape)
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    return {SLICES: slices, **sizes, "data": sizes["data"] // slices} if slices > 1 else sizes


def print_report(found: Mapping[str, Any]) -> None:
    """Prints tables of the programs' memory, time and communication."""
    people = wide_console()
    people.print(programs_table(found))
    if "train" in found["meshes"]:
        plain, exits = (found["training"][f"{name}_flops"] for name in ("plain", "exit"))
        people.print(f"the exits add {exits / plain:.1%} to the FLOPs of plain training")
    for one in found["programs"]:
        lines = [one["too_large"]] if one["too_large"] else []
        lines += [f"a loop of unknown length: {loop}" for loop in one["unknown_loops"]]
        if one["between_bytes"]:
            sent, least = one["between_bytes"] / 1e9, one["between_seconds"] * 1e3
            lines.append(f"each device sends {sent:.3f} GB to other slices: {least:.2f} ms alone")
        for line in lines:
            people.print(f"{one['name']}: {line}")
        if one["round"] is not None:
            people.print(round_table(one, found["decoding"]["strategy"]))
        if one["collectives"]:
            people.print(collectives_table(one))


def programs_table(found: Mapping[str, Any]) -> Table:
    """Table with a row per program. Only the FLOPs of plain training count as useful."""
    training, rows = found["training"], []
    for one in found["programs"]:
        sizes = dict(found["meshes"][one["name"]])
        slices = f"{sizes.pop(SLICES)} slices of " if SLICES in sizes else ""
        mesh = slices + " x ".join(map(str, sizes.values()))
        if (memory := one["memory"]) is None:
            rows.append([one["name"], mesh, "too large"])
            continue
        sizes = [f"{memory[part] / GIB:.2f}" for part in ("arguments", "temporaries", "total")]
        useful = ""
        if one["name"] in ("train", "plain"):
            useful = f"{training['plain_flops'] / training['peak_flops'] / one['seconds']:.1%}"
        share = f"{memory['total'] / memory['hbm']:.1%}"
        times = [f"{1e3 * one[key]:.2f}" for key in ("compute_seconds", "sent_seconds", "seconds")]
        rows.append([one["name"], mesh, one["attention"], *sizes, share, *times, useful])
    axes = " x ".join(next(iter(found["meshes"].values())))
    names = ["program", axes, "attention", "arguments", "temporaries", "all, GiB"]
    names += ["of HBM", "computing", "sending", "at least, ms", "plain FLOPs of peak"]
    return table(f"{found['topology']}, per device", names, rows, left=3)


def round_table(figures: Mapping[str, Any], strategy: str) -> Table:
    """Table of a decoding round: its time, the least time for its reads, and its kernels."""
    weights, cache = (1e3 * seconds for seconds in figures["round"].values())
    whole, reads = 1e3 * figures["seconds"], weights + cache
    cells = [f"{number:.2f}" for number in (weights, reads, whole, whole / reads)]
    cells.append(f"{figures['operations']:.0f}")
    names = ["weights", "and cache", "takes at least", "times that", "kernels"]
    each = "a token" if strategy == "autoregressive" else "a round"
    return table(f"decode: {each}, milliseconds", names, [cells])


def collectives_table(figures: Mapping[str, Any]) -> Table:
    """Table of a program's collectives, by kind and mesh axes."""
    groups = defaultdict(list)
    for one in figures["collectives"]:  # sorted by bytes sent
        groups[one["kind"], " x ".join(one["axes"])].append(one)
    rows = []
    for names, found in groups.items():
        gb, sent = (sum(one[k] * one["count"] for one in found) / 1e9 for k in ("bytes", "sent"))
        largest = max(found, key=lambda one: one["bytes"])["shape"]
        count = sum(one["count"] for one in found)
        rows.append([*names, f"{count:.0f}", f"{gb:.3f}", f"{sent:.3f}", largest])
    within = f"{figures['sent_bytes'] / 1e9:.2f} GB sent by each device within its slice"
    names = ["kind", "over", "times", "GB", "GB sent", "largest"]
    return table(f"{figures['name']}: {within}", names, rows, left=2)


parse = partial(parse_config, early=Slice, derived=default_mesh)
main = program(Arguments, report, __doc__, parse)
