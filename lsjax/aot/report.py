"""Compiles a program and says what it needs: memory, communication, time.

Figures are JSON objects. Seconds are bounds from below, for a device.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Lowered

from lsjax.aot.chips import GIB, Chip
from lsjax.aot.costs import CostAnalysis, ProgramCosts, Trips
from lsjax.aot.hlo import parse
from lsjax.aot.operations import attention_kernel
from lsjax.aot.programs import RoundReads
from lsjax.decoding.programs import ROUNDS

# What a warning of the compiler begins with, and what it means.
WARNINGS = {
    "Involuntary full rematerialization": "replicated by the partitioner:",
    "Can't reduce memory use below": "the compiler can't reduce memory use below",
    "exceeds the base limit": "the program's memory exceeds the base limit",
}
# Names of memory in the report -> in the compiler's analysis.
MEMORY = {
    "arguments": "argument",
    "outputs": "output",
    "temporaries": "temp",
    "aliased": "alias",  # outputs that share the memory of arguments
    "code": "generated_code",
}


def program_report(
    name: str,
    lowered: Lowered,
    trips: Trips,
    chip: Chip,
    mesh: Mapping[str, int],
    reads: RoundReads | None = None,
) -> dict[str, Any]:
    """Compiles, which takes a minute or more, and reads what came out.

    reads: of a round, for a program that loops over rounds; the costs are then those of a round.
    """
    begin = time.perf_counter()
    compiled = memory = too_large = once = None
    with captured_stderr() as log:
        try:
            compiled = lowered.compile()
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            too_large = _one_line(str(error))
    seconds, costs, flops = time.perf_counter() - begin, ProgramCosts(), 0.0
    if compiled is not None:
        found = compiled.memory_analysis()
        sizes = {key: getattr(found, f"{word}_size_in_bytes") for key, word in MEMORY.items()}
        memory = memory_figures(sizes, chip)
        if memory["total"] > chip.hbm:  # the compiler for GPUs makes programs of any size
            too_large = f"{name} needs {memory['total'] / GIB:.1f} GiB of {chip.hbm / GIB:.1f}"
        analysis = CostAnalysis(parse(compiled.as_text()), mesh, trips, chip)
        costs, once = (analysis.program(), None) if reads is None else analysis.loop(ROUNDS)
        flops = float((compiled.cost_analysis() or {}).get("flops", 0))
    report = {
        "name": name,
        "compile_seconds": round(seconds, 1),
        "too_large": too_large,
        "warnings": list(dict.fromkeys(problems(log))),
        "memory": memory,
        **cost_figures(costs, chip),
        # The compiler's own count: a loop's body once, a conditional at its dearest.
        "compiler_flops": flops,
    }
    return report if once is None else report | {"round": round_figures(costs, once, reads, chip)}


def memory_figures(sizes: Mapping[str, int], chip: Chip) -> dict[str, int]:
    """Bytes on each device. sizes: by the names in MEMORY."""
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    return {**sizes, "total": total, "hbm": chip.hbm}


def cost_figures(costs: ProgramCosts, chip: Chip) -> dict[str, Any]:
    """Costs of a run. A program takes at least as long as its computation or, with all links of
    the chip busy, its communication, if the two overlap entirely."""
    amounts, sent = costs.amounts, costs.sent_bytes
    largest_first = sorted(costs.collectives.items(), key=lambda item: -item[0].sent * item[1])
    return {
        "attention": attention_kernel(name for name, _ in costs.kernels),
        "cycles": amounts["cycles"],
        "flops": amounts["flops"],
        "moved_bytes": amounts["bytes"],
        "operations": costs.all_runs("operation"),
        "compute_seconds": amounts["seconds"],
        "sent_bytes": sent,
        "sent_seconds": sent / chip.link_bandwidth,
        "seconds": max(amounts["seconds"], sent / chip.link_bandwidth),
        "kernels": [
            {"name": name, "shape": shape, "count": count}
            for (name, shape), count in costs.kernels.items()
        ],
        "unknown_loops": sorted(costs.unknown_loops),
        "collectives": [
            one._asdict() | {"count": count, "bytes": one.bytes} for one, count in largest_first
        ],
    }


def round_figures(
    costs: ProgramCosts, once: ProgramCosts, reads: RoundReads, chip: Chip
) -> dict[str, Any]:
    """A round beside what it has to read, and what happens once per call."""
    seconds = cost_figures(costs, chip)["seconds"]
    weights, cache = reads.weights / chip.hbm_bandwidth, reads.cache / chip.hbm_bandwidth
    return {
        "seconds": seconds,
        "weights_seconds": weights,
        "cache_seconds": cache,
        "over_weights": seconds / weights,
        "over_weights_and_cache": seconds / (weights + cache),
        "once_seconds": once.amounts["seconds"],
        "once_moved_bytes": once.amounts["bytes"],
        "layer_passes": reads.layer_passes,
        "operations": costs.all_runs("operation"),
        "operations_in_layers": costs.runs["operation", True],
        "loops": costs.all_runs("while"),
        "loops_in_layers": costs.runs["while", True],
        "conditionals": costs.all_runs("conditional"),
        "conditionals_in_layers": costs.runs["conditional", True],
    }


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Lines that are written to stderr meanwhile, by the compiler too; there at the end."""
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as file, os.fdopen(os.dup(2)) as before:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before.fileno(), 2)
            file.seek(0)
            lines += file


def problems(log: list[str]) -> Iterator[str]:
    """The compiler's warnings that matter, in one line each."""
    for line in log:
        for mark, meaning in WARNINGS.items():
            if mark in line:
                detail = line.partition(mark)[2].partition("As the last")[0]
                yield _one_line(f"{meaning} {detail.lstrip(' .')}")


def _one_line(text: str, most: int = 400) -> str:
    return " ".join(text.split())[:most].strip(". ")
