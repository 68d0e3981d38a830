"""Costs of one run of a compiled program: time, memory traffic and communication. The body of a
loop counts once per trip.

The core takes the longer of an operation's cycles and its FLOPs at the chip's peak. The memory
takes its bytes at the bandwidth. Both may overlap. Without overlap, an operation takes the longer
of the two, and a prefetch belongs to the operation that reads it first. A conditional counts its
slowest branch, or the share in `Trips`. The trips of a loop are in the program, or are looked up by
the loop's name. A loop of unknown length counts once and is listed.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from lsjax.aot.chips import Chip
from lsjax.aot.hlo import COLLECTIVES, Computation, Instruction, operation_flops, runs
from lsjax.aot.traffic import is_prefetch, moved_bytes, prefetched

# Regular expression for the op_name of a loop -> its trips, or of a conditional -> the share of
# runs that take the slowest branch. The first match counts.
Trips = Mapping[str, float]
# The outermost axis of a mesh that covers several slices.
SLICES = "slices"


class Collective(NamedTuple):
    """Communication between devices."""

    kind: str  # one of COLLECTIVES
    axes: tuple[str, ...]  # of the mesh
    shape: str  # the larger of input and output
    bytes: int  # of this shape
    sent: int  # bytes that leave each device, by ring algorithms
    op_name: str
    channel: str | None  # shared by the parts of a collective in several fusions


@dataclass
class ProgramCosts:
    """Costs of one run of a program, or of a part of it.

    amounts: core_seconds; serial_seconds, without overlap of core and memory; a TPU's cycles; flops
    of matmuls and attention kernels; moved_bytes, from and to the device's memory; operations
    (kernels on GPUs). kernels: custom kernels. unknown_loops: names.
    """

    amounts: Counter[str] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    unknown_loops: Counter[str] = field(default_factory=Counter)

    def add(self, other: "ProgramCosts", times: float = 1) -> None:
        """Adds the costs of a part that runs `times` times."""
        if times == 0:
            return
        for name, counts in vars(other).items():
            for key, count in counts.items():
                getattr(self, name)[key] += times * count

    def sent_bytes(self, *, between: bool) -> float:
        """Bytes that leave each device for other slices if `between`, else within its slice."""
        found = self.collectives.items()
        return sum(one.sent * count for one, count in found if (SLICES in one.axes) == between)


class CostAnalysis:
    """Counts the costs of a program on a chip. mesh: sizes of its axes, in order, SLICES first if
    there are several; the program numbers its devices along the last axis first."""

    def __init__(self, parts: list[Computation], mesh: Mapping[str, int], trips: Trips, chip: Chip):
        self.parts, self.mesh, self.trips, self.chip = parts, mesh, trips, chip
        self._known: dict[str, ProgramCosts] = {}

    def program(self) -> ProgramCosts:
        """Costs of one run of the program."""
        return self._computation(self.parts[-1])

    def loop(self, scope: str) -> ProgramCosts:
        """Costs of one trip of the loop at jit(run)/.../SCOPE/while."""
        every = [part.instructions.values() for part in self.parts]
        loops = (one for one in chain(*every) if one.opcode == "while")
        loop = next(one for one in loops if one.op_name.endswith(f"/{scope}/while"))
        return self._all(loop, "condition", "body")

    def around(self, scope: str) -> ProgramCosts:
        """Costs of one run of the program without that loop."""
        trips = {**self.trips, rf"/{scope}/while$": 0}
        return CostAnalysis(self.parts, self.mesh, trips, self.chip).program()

    def _computation(self, computation: Computation) -> ProgramCosts:
        if computation.name not in self._known:
            self._known[computation.name] = total = ProgramCosts()
            seen: set[str] = set()
            unread: dict[Instruction, float] = {}  # bytes of prefetches
            for one in computation.instructions.values():
                if is_prefetch(one):
                    unread[one] = moved_bytes(one)
                else:
                    read = prefetched(one) if runs(one) else ()
                    self._add(total, one, sum(unread.pop(done, 0.0) for done in read))
                for collective, count in self._sent(one).items():
                    # A channel that was seen belongs to a part of the same collective.
                    if collective.channel not in seen:
                        seen |= {collective.channel} - {None}
                        total.collectives[collective] += count
            for moved in unread.values():  # read by another computation
                self._count(total, moved=moved)
        return self._known[computation.name]

    def _all(self, one: Instruction, *roles: str) -> ProgramCosts:
        """Costs of one run of everything that an instruction calls in these roles."""
        total = ProgramCosts()
        for role in roles:
            for part in one.called.get(role, ()):
                total.add(self._computation(part))
        return total

    def _count(
        self, total: ProgramCosts, *, cycles: int = 0, flops: float = 0, moved: float = 0
    ) -> None:
        """Adds an operation with these cycles, FLOPs and bytes of HBM."""
        core = max(cycles / self.chip.clock, flops / self.chip.peak_flops)
        serial = max(core, moved / self.chip.hbm_bandwidth)
        total.amounts.update(core_seconds=core, serial_seconds=serial)
        total.amounts.update(cycles=cycles, flops=flops, moved_bytes=moved)

    def _add(self, total: ProgramCosts, one: Instruction, fetched: float) -> None:
        """Adds an instruction without its communication. A fusion's figures cover its contents.
        fetched: bytes of the prefetches that it is the first to read."""
        # Trips of a loop, or the share of the slowest branch.
        named = (n for name, n in self.trips.items() if re.search(name, one.op_name))
        match one.opcode:
            case "while":
                known = trip_count(one)
                times = next(named, None) if known is None else known
                if times is None:
                    total.unknown_loops[one.op_name or one.name] += 1
                total.add(self._all(one, "condition", "body"), 1 if times is None else times)
            case "conditional":
                branches = [self._computation(part) for part in chain(*one.called.values())]
                branches.sort(key=lambda b: (b.amounts["serial_seconds"], b.amounts["cycles"]))
                share = next(named, 1)
                total.add(branches[-1], share)
                if share < 1:
                    total.add(branches[0], 1 - share)
            case "call" | "async-start":
                total.add(self._all(one, "calls", "to_apply"))
            case _:
                cycles = int(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)  # on TPUs
                moved = moved_bytes(one) + fetched
                self._count(total, cycles=cycles, flops=operation_flops(one), moved=moved)
                total.amounts["operations"] += runs(one)
                if one.opcode == "custom-call" and runs(one):
                    total.kernels[one.kernel] += 1

    def _sent(self, one: Instruction) -> Mapping[Collective, float]:
        """Collectives of an operation, with their counts."""
        if one.opcode == "fusion":
            (inner,) = one.called["calls"]
            found = self._computation(inner).collectives
            if not inner.name.startswith("all-reduce-scatter"):
                return found
            # An all-reduce that leaves each device its share is a reduce-scatter.
            kind = "reduce-scatter"
            return {o._replace(kind=kind, sent=o.sent // 2): n for o, n in found.items()}
        if one.opcode == "send":
            return sent_between(one, self.mesh.get(SLICES, 1))
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return {}
        done = next((user for user, _ in one.users if user.opcode == f"{kind}-done"), one)
        sides = ([array for operand in one.operands for array in operand.arrays], done.arrays)
        larger = max(sides, key=lambda side: sum(array.bytes for array in side))
        size = int(sum(array.bytes for array in larger))
        groups = device_groups(one.attributes, math.prod(self.mesh.values()))
        sent = ring_bytes(kind, size, groups.shape[1])
        places = zip(self.mesh, np.unravel_index(groups, tuple(self.mesh.values())), strict=True)
        axes = tuple(name for name, place in places if (place != place[:, :1]).any())
        channel = one.attribute(r"channel_id=(\d+)") or None
        shape = ", ".join(map(str, larger))
        return {Collective(kind, axes, shape, size, sent, one.op_name, channel): 1}


def sent_between(one: Instruction, slices: int) -> dict[Collective, int]:
    """The collective between slices of a TPU's send to its host; other sends have none.

    The compiler splits a collective over several slices: parts within a slice number its devices
    from 0, and the hosts combine what the slices send.
    """
    kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    if not kind:
        return {}
    kind = "collective-permute" if kind == "one-to-one" else kind
    (array,) = one.operands[0].arrays
    size = int(array.bytes) * (slices if kind == "all-gather" else 1)
    sent = ring_bytes(kind, size, slices)
    return {Collective(kind, (SLICES,), str(array), size, sent, one.op_name, None): 1}


def ring_bytes(kind: str, size: int, members: int) -> int:
    """Bytes that each member of a group sends in a collective of that many bytes."""
    others = (members - 1) / members
    return int({"collective-permute": 1, "all-reduce": 2 * others}.get(kind, others) * size)


def trip_count(loop: Instruction) -> int | None:
    """Trips of a `while`, if the program states them: as an attribute, or by the constants where
    a counter begins, that it is compared with, and that each trip adds."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    (condition,), (body,) = loop.called["condition"], loop.called["body"]
    if "direction=LT" not in condition.root.attributes:
        return None
    counter, limit = map(_copied, condition.root.operands)
    if limit.opcode != "constant":
        return None
    # A peeled loop begins at 1. The partitioner's loops of matmuls take two steps in a trip.
    first, step = 0, 1
    if (index := counter.attribute(r"\bindex=(\d+)")) and body.root.opcode == "tuple":
        after = body.root.operands[int(index)]
        added = [one for one in after.operands if one.opcode == "constant"]
        step = int(added[0].inputs) if after.opcode == "add" and added else 1
        if loop.operands[0].opcode == "tuple":
            begin = _copied(loop.operands[0].operands[int(index)])
            first = int(begin.inputs) if begin.opcode == "constant" else 0
    return -(-(int(limit.inputs) - first) // step)


def _copied(one: Instruction) -> Instruction:
    """The value that this is a copy of."""
    while one.opcode in ("copy", "bitcast", "convert"):
        one = one.operands[0]
    return one


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices per group] that communicate, from any notation of HLO."""
    if pairs := re.search(r"(?:_groups|_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", pairs[1])])
    # [2,4]<=[4,2]T(1,0): 0..7 as [4, 2], transposed, as [2, 4]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=([^ ]+)", attributes):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: along some axes of a mesh
    if named := re.search(r"replica_groups=mesh\[([^\]]+)\](.*?)\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = _iota(named[2]) if "device_ids" in named[2] else np.arange(devices)
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[3])]
        ids = np.moveaxis(ids.reshape([*map(int, sizes.values())]), along, range(-len(along), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(along) :]))
    return np.arange(devices)[None]  # {}: all of them


def _iota(text: str) -> np.ndarray:
    """0, 1, ... in the shape [4,2], then transposed as T(1,0) says."""
    sizes, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
