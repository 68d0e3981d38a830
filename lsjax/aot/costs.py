"""What one run of a compiled program costs: time, memory traffic, and what devices send; a loop's
body counts as often as it runs.

An operation takes the longest of its cycles, its FLOPs at the chip's peak, and its bytes at the
memory's bandwidth. Of a conditional the branch that takes longest counts. A loop whose number of
trips the program does not say is looked up by its name; an unknown one counts once and is listed.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lsjax.aot.chips import Chip
from lsjax.aot.hlo import (
    COLLECTIVES,
    Computation,
    HloModule,
    Instruction,
    moved_bytes,
    operation_flops,
    runs,
)

# Regular expression of a loop's op_name -> its trips; of a conditional's -> the share of runs that
# take the dearest branch. The first that matches counts.
Trips = Mapping[str, float]


class Collective(NamedTuple):
    """Communication between devices."""

    kind: str  # one of COLLECTIVES
    axes: tuple[str, ...]  # of the mesh
    shape: str  # the larger side: what is gathered, reduced, or exchanged
    bytes: int  # of that
    sent: int  # bytes that leave each device, by ring algorithms
    op_name: str
    channel: str | None  # shared by the parts that the compiler spreads over several fusions


@dataclass
class ProgramCosts:
    """Costs of one run of a program, or of a part of it.

    amounts: seconds, one operation after the other; cycles; flops of products outside of a TPU's
    own operations, and of attention kernels; bytes read from the device's memory and written to
    it. runs: of each "operation" (kernel, on GPUs), "while" and "conditional". kernels: custom
    ones, by name.
    """

    amounts: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: "ProgramCosts", times: float = 1) -> None:
        """Adds so many runs of a part."""
        for name in ("amounts", "runs", "collectives", "kernels"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] += times * count
        self.unknown_loops |= other.unknown_loops

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave each device."""
        return sum(one.sent * count for one, count in self.collectives.items())


class CostAnalysis:
    """Counts what the computations of a program cost on a chip. mesh: sizes of its axes, in order;
    the devices of the program count along the last axis first."""

    def __init__(self, module: HloModule, mesh: Mapping[str, int], trips: Trips, chip: Chip):
        self.module, self.mesh, self.trips, self.chip = module, mesh, trips, chip
        self._known: dict[str, ProgramCosts] = {}

    def program(self) -> ProgramCosts:
        """Costs of one run of the program."""
        return self._computation(self.module.entry)

    def loop(self, scope: str) -> tuple[ProgramCosts, ProgramCosts]:
        """Costs of one trip of the loop in this named scope, jit(run)/.../SCOPE/while, which has to
        count once, and of all else."""
        parts = self.module.computations.values()
        every = (one for part in parts for one in part.instructions.values())
        loops = (one for one in every if one.opcode == "while")
        each = self._trip(next(one for one in loops if one.op_name.endswith(f"/{scope}/while")))
        once = ProgramCosts()
        once.add(self.program())
        once.add(each, -1)
        return each, once

    def _computation(self, computation: Computation) -> ProgramCosts:
        if computation.name not in self._known:
            self._known[computation.name] = total = ProgramCosts()
            seen: set[str] = set()
            for one in computation.instructions.values():
                self._add(total, one)
                for collective, count in self._sent(one).items():
                    # A channel that was seen belongs to a part of the same collective.
                    if collective.channel not in seen:
                        seen |= {collective.channel} - {None}
                        total.collectives[collective] += count
        return self._known[computation.name]

    def _called(self, one: Instruction, *roles: str) -> list[ProgramCosts]:
        return [self._computation(part) for role in roles for part in one.called.get(role, ())]

    def _trip(self, loop: Instruction) -> ProgramCosts:
        total = ProgramCosts()
        for part in self._called(loop, "condition", "body"):
            total.add(part)
        return total

    def _add(self, total: ProgramCosts, one: Instruction) -> None:
        """Adds one instruction, but for what it sends. A fusion's own figures stand for all that is
        in it."""
        if runs(one) or one.opcode in ("while", "conditional"):
            total.runs["operation" if runs(one) else one.opcode] += 1
        match one.opcode:
            case "while":
                known = trip_count(one)
                times = self._named(one) if known is None else known
                if times is None:
                    total.unknown_loops.add(one.op_name or one.name)
                total.add(self._trip(one), 1 if times is None else times)
            case "conditional":
                # All of the dearest branch, or as large a share as `trips` says for this name.
                branches = self._called(one, *one.called)
                branches.sort(key=lambda branch: [branch.amounts[n] for n in ("seconds", "cycles")])
                share = self._named(one)
                total.add(branches[-1], 1 if share is None else share)
                if share is not None:
                    total.add(branches[0], 1 - share)
            case "call" | "async-start":
                for part in self._called(one, "calls", "to_apply"):
                    total.add(part)
            case _:
                cycles = int(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)  # on TPUs
                flops, moved = operation_flops(one), moved_bytes(one)
                seconds = self.chip.seconds(cycles, flops, moved)
                total.amounts.update(seconds=seconds, cycles=cycles, flops=flops, bytes=moved)
                if one.opcode == "custom-call" and runs(one):
                    total.kernels[one.kernel] += 1

    def _named(self, one: Instruction) -> float | None:
        """Trips or share by the name of a loop or conditional."""
        found = (n for name, n in self.trips.items() if re.search(name, one.op_name))
        return next(found, None)

    def _sent(self, one: Instruction) -> Mapping[Collective, float]:
        """What an operation sends."""
        if one.opcode == "fusion":
            (inner,) = one.called["calls"]
            found = self._computation(inner).collectives
            if not inner.name.startswith("all-reduce-scatter"):
                return found
            # An all-reduce of which each device keeps its share is a reduce-scatter.
            kind = "reduce-scatter"
            return {o._replace(kind=kind, sent=o.sent // 2): n for o, n in found.items()}
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return {}
        done = next((user for user, _ in one.users if user.opcode == f"{kind}-done"), one)
        sides = ([array for operand in one.operands for array in operand.arrays], done.arrays)
        larger = max(sides, key=lambda side: sum(array.bytes for array in side))
        size = int(sum(array.bytes for array in larger))
        groups = device_groups(one.attributes, math.prod(self.mesh.values()))
        others = (groups.shape[1] - 1) / groups.shape[1]
        sent = int({"collective-permute": 1, "all-reduce": 2 * others}.get(kind, others) * size)
        places = np.unravel_index(groups, tuple(self.mesh.values()))
        differ = [(place != place[:, :1]).any() for place in places]
        axes = tuple(name for name, differs in zip(self.mesh, differ, strict=True) if differs)
        channel = one.attribute(r"channel_id=(\d+)") or None
        shape = ", ".join(map(str, larger))
        return {Collective(kind, axes, shape, size, sent, one.op_name, channel): 1}


def trip_count(loop: Instruction) -> int | None:
    """How often the body of a `while` runs, where the program says so: as an attribute, or by the
    constant that the counter of a scan is compared with."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    (condition,) = loop.called["condition"]
    if not known and "direction=LT" in condition.root.attributes:
        limit = condition.root.operands[1]
        while limit.opcode in ("copy", "bitcast", "convert"):
            limit = limit.operands[0]
        known = limit.inputs if limit.opcode == "constant" else ""
    return int(known) if known else None


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices of each] that communicate, from any of the ways to write that."""
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if pairs:
        return np.array([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", pairs[1])])
    # [2,4]<=[4,2]T(1,0): 0..7 as [4, 2], transposed, as [2, 4]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: along some axes of a mesh
    named = re.search(r"replica_groups=mesh\[([^\]]+)\](.*?)\{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", named[2])
        ids = np.arange(devices) if order is None else _iota(order[1])
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
        ids = np.moveaxis(ids.reshape(tuple(sizes.values())), along, range(-len(along), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(along) :]))
    return np.arange(devices)[None]  # {}: all of them


def _iota(text: str) -> np.ndarray:
    sizes, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
