"""Compiles a program and says what it needs: memory, communication, cycles."""

import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Lowered

from lsjax.aot.chips import Chip
from lsjax.aot.costs import Collective, Costs, Trips, program_costs
from lsjax.aot.hlo import parse

REMATERIALISED = "Involuntary full rematerialization"
# Products of [T, T] by [T, H] or alike in the kernels of splash attention.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


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
    too_large: str | None  # what the compiler says of a program that does not fit
    rematerialised: tuple[str, ...]  # operations that the partitioner replicates, as it says
    memory: Memory | None = None
    costs: Costs = field(default_factory=Costs)
    compiler_flops: float = 0.0
    """The compiler's own count, on a device: a loop's body once, a conditional at its dearest."""

    @property
    def kernel_flops(self) -> float:
        """Of custom kernels, which have no estimate: causal attention, on a device."""
        return sum(count * kernel_flops(*kernel) for kernel, count in self.costs.kernels.items())

    @property
    def compute_seconds(self) -> float:
        """Cycles by the clock, and the kernels at the peak."""
        return self.costs.cycles / self.chip.clock + self.kernel_flops / self.chip.peak_flops

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

    def to_json(self) -> dict[str, Any]:
        """All of it; collectives by what they are, with how often they run."""
        memory = None
        if self.memory is not None:
            memory = asdict(self.memory) | {"total": self.memory.total, "hbm": self.chip.hbm}
        return {
            "name": self.name,
            "compile_seconds": round(self.compile_seconds, 1),
            "too_large": self.too_large,
            "rematerialised": list(self.rematerialised),
            "memory": memory,
            "cycles": self.costs.cycles,
            "compute_seconds": self.compute_seconds,
            "sent_bytes": self.sent_bytes,
            "sent_seconds": self.sent_seconds,
            "seconds": self.seconds,
            "kernels": [
                {"name": name, "shape": shape, "count": count}
                for (name, shape), count in self.costs.kernels.items()
            ],
            "kernel_flops": self.kernel_flops,
            "compiler_flops": self.compiler_flops,
            "unknown_loops": sorted(self.costs.unknown_loops),
            "collectives": [
                one._asdict() | {"count": count, "bytes": one.bytes}
                for one, count in largest_first(self.costs.collectives)
            ],
        }


def compile_report(
    name: str, lowered: Lowered, trips: Trips, chip: Chip, mesh: Mapping[str, int]
) -> Report:
    """Compiles, which takes a minute or more, and reads what came out."""
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
    warnings = tuple(dict.fromkeys(_problems(log)))
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
    costs = program_costs(parse(compiled.as_text()), mesh, trips)
    flops = float((compiled.cost_analysis() or {}).get("flops", 0))
    return Report(name, chip, seconds, None, warnings, memory, costs, flops)


def largest_first(collectives: Mapping[Collective, float]) -> list[tuple[Collective, float]]:
    """By what they send in all."""
    return sorted(collectives.items(), key=lambda item: -item[0].sent * item[1])


def kernel_flops(name: str, shape: str) -> float:
    """Of a splash attention kernel on queries of this shape, [B, N, T, H], of which causality
    leaves half; 0 for others."""
    products = next((n for kind, n in SPLASH_PRODUCTS.items() if f"splash_mha_{kind}" in name), 0)
    sizes = [int(size) for size in re.findall(r"\d+", shape.partition("[")[2])]
    if not products or len(sizes) < 3:
        return 0.0
    *rows, steps, width = sizes
    return products * 2.0 * math.prod(rows) * steps * steps * width / 2


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


def _problems(log: list[str]) -> Iterator[str]:
    for line in log:
        if REMATERIALISED in line:
            yield _one_line(line.partition(REMATERIALISED)[2].partition("As the last")[0])


def _one_line(text: str, most: int = 400) -> str:
    return " ".join(text.split())[:most].strip(". ")
