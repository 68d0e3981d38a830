"""Lowers training programs from shapes alone, compiles programs for devices that need not be
present, and reports their costs.

Figures are JSON objects, per device.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from jax.stages import Lowered, Wrapped

from lsjax.aot.chips import GIB, Chip
from lsjax.aot.costs import SLICES, CostAnalysis, ProgramCosts, Trips
from lsjax.aot.hlo import attention_kernel, parse
from lsjax.config import TrainConfig
from lsjax.decoding.scopes import ROUNDS
from lsjax.model.parameters import placed_shapes
from lsjax.platforms import with_kernels
from lsjax.sharding import context_shards
from lsjax.training.early_exit import exit_counts
from lsjax.training.head_loss import CHUNKS, EXITS, loss_chunk
from lsjax.training.recipe import PAPER, Recipe
from lsjax.training.step import abstract_state, check_rows, make_train_step

# Amounts of `ProgramCosts` in a report, beside its times.
AMOUNTS = ("cycles", "flops", "moved_bytes", "operations")
# What to count of a compiled program: a kind of round (`round_figures`), or None for one run of
# the whole program; and the trips of the loops.
Counted = tuple[Mapping[str, Any] | None, Trips]


def train_step(config: TrainConfig, mesh: Mesh, recipe: Recipe = PAPER) -> tuple[Lowered, Trips]:
    """The step of train.py and the trips of its loops. Every position is labelled, and the number
    of enabled exits is the run's average."""
    check_rows(config, mesh)
    state, batch = abstract_state(config, mesh, recipe.optimizer), batch_shapes(config, mesh)
    rows, drafted = config.batch_size // config.micro_batches, config.exit_blocks.draft_vocab
    ids = None if drafted is None else np.arange(drafted)
    with jax.set_mesh(mesh), with_kernels(config.kernels):
        lowered = make_train_step(config, **vars(recipe), draft_ids=ids).lower(state, batch)
        pieces, steps = rows * context_shards(), config.seq_len // context_shards()
        shape = pieces, steps, (drafted or config.model.vocab_size, config.model.hidden_size)
        chunk = loss_chunk(*shape)
        exit_chunk = loss_chunk(*shape, config.early_exit.token_share)
    run = config.early_exit, config.model.num_layers, config.num_steps
    exits = exit_counts(*run, recipe.exit_weights).mean()
    learned = math.ceil(steps * config.early_exit.token_share)
    return lowered, {
        rf"/{EXITS}/while$": float(exits),
        rf"/{EXITS}/.*/{CHUNKS}/while$": math.ceil(learned / exit_chunk),
        rf"/{CHUNKS}/while$": math.ceil(steps / chunk),
    }


def evaluation(config: TrainConfig, mesh: Mesh, score: Wrapped) -> tuple[Lowered, Trips]:
    """The program with which train.py scores every exit on a batch; score: `exit_sums` of
    lsjax/evaluation. The program states the trips of all its loops."""
    check_rows(config, mesh)
    model, batch = abstract_state(config, mesh).model, batch_shapes(config, mesh)
    names = ("dtype", "micro_batches", "attention", "kernels")
    with jax.set_mesh(mesh):
        return score.lower(model, batch, **{name: getattr(config, name) for name in names}), {}


def program_reports(
    name: str, lowered: Lowered, counted: Sequence[Counted], chip: Chip, mesh: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Compiles a program, which may take minutes, and returns its figures for each count.

    Those of a round leave out what happens once per call, which is beside them.
    """
    memory = too_large = parts = None
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        too_large = " ".join(str(error).split())[:400]
    else:
        memory = memory_figures(partial(getattr, compiled.memory_analysis()), chip)
        if memory["total"] > chip.hbm:  # the GPU compiler accepts programs of any size
            too_large = f"{name} needs {memory['total'] / GIB:.1f} GiB of {chip.hbm / GIB:.1f}"
        parts = parse(compiled.as_text())
    seconds, reports = time.perf_counter() - begin, []
    for kind, trips in counted:
        costs = once = ProgramCosts()
        if parts is not None:
            analysis = CostAnalysis(parts, mesh, trips, chip)
            costs = analysis.program() if kind is None else analysis.loop(ROUNDS)
            once = once if kind is None else analysis.around(ROUNDS)
        beside = {"once_per_call": time_figures(once, chip)}
        of_round = None if kind is None else {**kind, **beside}
        found = {"name": name, "too_large": too_large, "memory": memory, "round": of_round}
        found["compile_seconds"] = seconds  # with the parsing of its text
        reports.append(found | cost_figures(costs, chip))
    return reports


def sizes_by_slice(mesh: Mesh) -> dict[str, int]:
    """Sizes of a mesh's axes. Several slices are an axis of their own, the first."""
    sizes = dict(mesh.shape)
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    return {SLICES: slices, **sizes, "data": sizes["data"] // slices} if slices > 1 else sizes


def memory_figures(found: Callable[[str], int], chip: Chip) -> dict[str, int]:
    """Bytes on each device. found: returns a size by its name in the compiler's analysis."""
    names = dict(arguments="argument", outputs="output", temporaries="temp", code="generated_code")
    sizes = {name: found(f"{word}_size_in_bytes") for name, word in names.items()}
    shared = found("alias_size_in_bytes")  # outputs that share the memory of arguments
    return {**sizes, "aliased": shared, "total": sum(sizes.values()) - shared, "hbm": chip.hbm}


def time_figures(costs: ProgramCosts, chip: Chip) -> dict[str, float]:
    """Times of one run: of the memory, the core, and links within slices and between them, each
    alone. `seconds` is the longest, a lower bound: all overlap, and all links are busy.
    `serial_seconds` is without overlap of core and memory."""
    within, between = costs.sent_bytes(between=False), costs.sent_bytes(between=True)
    sent = within / chip.link_bandwidth
    sent_between = between / chip.slice_bandwidth if between else 0.0
    memory = costs.amounts["moved_bytes"] / chip.hbm_bandwidth
    core, serial = costs.amounts["core_seconds"], costs.amounts["serial_seconds"]
    return {
        "memory_seconds": memory,
        "core_seconds": core,
        "sent_seconds": sent,
        "between_seconds": sent_between,
        "seconds": max(memory, core, sent, sent_between),
        "serial_seconds": max(serial, sent, sent_between),
    }


def cost_figures(costs: ProgramCosts, chip: Chip) -> dict[str, Any]:
    """Costs of one run."""
    largest_first = sorted(costs.collectives.items(), key=lambda item: -item[0].sent * item[1])
    return {
        "attention": attention_kernel(costs.kernels),
        **{name: costs.amounts[name] for name in AMOUNTS},
        "sent_bytes": costs.sent_bytes(between=False),
        "between_bytes": costs.sent_bytes(between=True),
        **time_figures(costs, chip),
        "kernels": dict(costs.kernels),
        "unknown_loops": sorted(costs.unknown_loops),
        "collectives": [one._asdict() | {"count": count} for one, count in largest_first],
    }


def batch_shapes(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a step's batch, with shardings."""
    shape = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    names = ("tokens_BT", "labels_BT", "segments_BT", "positions_BT")
    return placed_shapes({name: shape for name in names}, mesh)
