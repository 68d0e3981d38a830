"""Compiles a program and says what it needs: memory, communication, time."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Lowered

from lsjax.aot.chips import GIB, Chip
from lsjax.aot.costs import Collective, Costs, Counting, Trips
from lsjax.aot.hlo import parse
from lsjax.aot.needs import Needs
from lsjax.decoding.programs import ROUNDS

# What a warning of the compiler begins with, and what it means.
WARNINGS = {
    "Involuntary full rematerialization": "replicated by the partitioner:",
    "Can't reduce memory use below": "the compiler can't reduce memory use below",
    "exceeds the base limit": "the program's memory exceeds the base limit",
}
# Part of a kernel's name -> the attention that it belongs to.
ATTENTION = {
    "__cudnn$fmha": "cudnn",
    "splash_mha": "splash",
    "flash_forward": "flash",
    "flash_decoding": "flash decoding",
}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int  # outputs that lie where arguments did
    code: int

    @property
    def total(self) -> int:
        """All at once."""
        parts = self.arguments + self.outputs - self.aliased + self.temporaries
        return parts + self.code


@dataclass(frozen=True)
class Report:
    """What the compiler made of a program. Seconds are bounds from below, for a device."""

    name: str
    chip: Chip
    compile_seconds: float
    too_large: str | None  # why a program does not fit
    warnings: tuple[str, ...]  # of the compiler, those that matter
    memory: Memory | None = None
    costs: Costs = field(default_factory=Costs)
    """Costs of a run; for a loop over rounds, of one round."""
    once: Costs | None = None
    """Costs of what such a program does outside of that loop."""
    needs: Needs | None = None
    """What a round has to read."""
    compiler_flops: float = 0.0
    """The compiler's own count, on a device: a loop's body once, a conditional at its dearest."""

    @property
    def compute_seconds(self) -> float:
        """Each operation as long as its cycles, FLOPs or bytes take."""
        return self.costs.seconds

    @property
    def sent_bytes(self) -> float:
        """That leave a device."""
        return sum(one.sent * count for one, count in self.costs.collectives.items())

    @property
    def sent_seconds(self) -> float:
        """With all links of a chip busy."""
        return self.sent_bytes / self.chip.link_bandwidth

    @property
    def seconds(self) -> float:
        """The least that a run takes, where all communication hides behind the computation."""
        return max(self.compute_seconds, self.sent_seconds)

    @property
    def attention(self) -> str:
        """The kernel: cudnn, splash, flash, or xla for products of the compiler's own."""
        names = " ".join(name for name, _ in self.costs.kernels)
        return next((kernel for mark, kernel in ATTENTION.items() if mark in names), "xla")

    def to_json(self) -> dict[str, Any]:
        """All of it; collectives by what they are, with how often they run."""
        memory = None
        if self.memory is not None:
            memory = asdict(self.memory) | {"total": self.memory.total, "hbm": self.chip.hbm}
        found = {
            "name": self.name,
            "compile_seconds": round(self.compile_seconds, 1),
            "too_large": self.too_large,
            "warnings": list(self.warnings),
            "memory": memory,
            "attention": self.attention,
            "cycles": self.costs.cycles,
            "flops": self.costs.flops,
            "moved_bytes": self.costs.bytes,
            "operations": self.costs.operations,
            "compute_seconds": self.compute_seconds,
            "sent_bytes": self.sent_bytes,
            "sent_seconds": self.sent_seconds,
            "seconds": self.seconds,
            "kernels": [
                {"name": name, "shape": shape, "count": count}
                for (name, shape), count in self.costs.kernels.items()
            ],
            "compiler_flops": self.compiler_flops,
            "unknown_loops": sorted(self.costs.unknown_loops),
            "collectives": [
                one._asdict() | {"count": count, "bytes": one.bytes}
                for one, count in largest_first(self.costs.collectives)
            ],
        }
        return found | {"round": self.round_json()} if self.needs is not None else found

    def round_json(self) -> dict[str, Any]:
        """A round beside what it has to read, and what happens once per call."""
        bandwidth, control, needs = self.chip.hbm_bandwidth, self.costs.control, self.needs
        bound = (needs.weights + needs.cache) / bandwidth
        return {
            "seconds": self.seconds,
            "weights_seconds": needs.weights / bandwidth,
            "cache_seconds": needs.cache / bandwidth,
            "over_weights": self.seconds / (needs.weights / bandwidth),
            "over_weights_and_cache": self.seconds / bound,
            "once_seconds": self.once.seconds,
            "once_moved_bytes": self.once.bytes,
            "layer_passes": needs.layer_passes,
            "operations": self.costs.operations,
            "operations_in_layers": self.costs.layer_operations,
            "loops": control["while", True] + control["while", False],
            "loops_in_layers": control["while", True],
            "conditionals": control["conditional", True] + control["conditional", False],
            "conditionals_in_layers": control["conditional", True],
        }


def compile_report(
    name: str,
    lowered: Lowered,
    trips: Trips,
    chip: Chip,
    mesh: Mapping[str, int],
    needs: Needs | None = None,
) -> Report:
    """Compiles, which takes a minute or more, and reads what came out. needs: of a round, for a
    program that loops over rounds."""
    begin = time.perf_counter()
    too_large = None
    with captured_stderr() as log:
        try:
            compiled = lowered.compile()
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            too_large = _one_line(str(error))
    seconds = time.perf_counter() - begin
    warnings = tuple(dict.fromkeys(problems(log)))
    if too_large is not None:
        return Report(name, chip, seconds, too_large, warnings)
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    # The compiler for GPUs makes programs of any size.
    if memory.total > chip.hbm:
        too_large = f"{name} needs {memory.total / GIB:.1f} GiB of {chip.hbm / GIB:.1f}"
    program = parse(compiled.as_text())
    counting = Counting(program, mesh, trips, chip)
    costs, once = counting.of(program.entry), None
    if needs is not None:
        costs, once = in_rounds(costs, counting.of_loop(ROUNDS))
    flops = float((compiled.cost_analysis() or {}).get("flops", 0))
    return Report(name, chip, seconds, too_large, warnings, memory, costs, once, needs, flops)


def in_rounds(whole: Costs, each: Costs | None) -> tuple[Costs, Costs]:
    """Costs of a round, and of all else in a program whose loop over rounds counts once."""
    if each is None:
        raise ValueError(f"the program has no loop {ROUNDS!r}")
    once = Costs()
    once.add(whole)
    once.add(each, -1)
    return each, once


def largest_first(collectives: Mapping[Collective, float]) -> list[tuple[Collective, float]]:
    """By what they send in all."""
    return sorted(collectives.items(), key=lambda item: -item[0].sent * item[1])


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Lines that are written to stderr meanwhile, by the compiler too; there at the end."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
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
