"""What one run of a compiled program costs: time, memory traffic, and what devices send; a loop's
body counts as often as it runs.

An operation takes the longest of its cycles, its FLOPs at the chip's peak, and its bytes at the
memory's bandwidth. Of a conditional the branch that takes longest counts. Loops whose number of
trips the program does not say are looked up by their name; those without one count once and are
listed.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lsjax.aot.chips import Chip
from lsjax.aot.hlo import Computation, Instruction, Program
from lsjax.aot.shapes import bare, shape_bytes, started
from lsjax.aot.traffic import COLLECTIVES, moved_bytes, runs
from lsjax.aot.work import largest_operand, operation_flops

LAYER = "Block."  # methods of the model's layers
# op_name of a loop -> its trips, None if they are not known; of a conditional -> the share of runs
# that take the dearest branch, None for all.
Trips = Callable[[str], float | None]


class Collective(NamedTuple):
    """What devices do together."""

    kind: str  # one of COLLECTIVES
    axes: tuple[str, ...]  # of the mesh, over which
    shape: str  # of the larger side: what is gathered, reduced, or exchanged
    sent: int  # bytes that leave each device, by ring algorithms
    op_name: str
    channel: str | None  # parts of one that the compiler spreads over several fusions share it

    @property
    def bytes(self) -> int:
        """Of the larger side."""
        return shape_bytes(self.shape)


@dataclass
class Costs:
    """Of one run of a program, or of a part of it."""

    seconds: float = 0.0
    """Sum over all operations, one after the other."""
    cycles: float = 0.0
    flops: float = 0.0
    """FLOPs of products outside of a TPU's own operations, and of attention kernels."""
    bytes: float = 0.0
    """Read from the device's memory and written to it."""
    operations: float = 0.0
    """Kernels, on GPUs."""
    layer_operations: float = 0.0
    """Those of them that are in layers."""
    control: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Runs of loops and conditionals: "while" or "conditional", and whether in a layer."""
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Custom kernels: name and largest operand."""
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: "Costs", times: float = 1) -> None:
        """Adds so many runs of a part."""
        for name in ("seconds", "cycles", "flops", "bytes", "operations", "layer_operations"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("control", "collectives", "kernels"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] += times * count
        self.unknown_loops |= other.unknown_loops


class Counting:
    """Counts what the computations of a program cost on a chip. mesh: sizes of its axes, in order;
    the devices of the program count along the last axis first."""

    def __init__(self, program: Program, mesh: Mapping[str, int], trips: Trips, chip: Chip):
        self._program, self._mesh, self._trips, self._chip = program, mesh, trips, chip
        self._done: dict[str, Costs] = {}

    def of(self, name: str) -> Costs:
        """Costs of one run of a computation."""
        if name not in self._done:
            self._done[name] = total = Costs()
            computation, seen = self._program.computations[name], set()
            for instruction in computation.instructions.values():
                self._add(total, computation, instruction, seen)
        return self._done[name]

    def of_loop(self, scope: str) -> Costs | None:
        """Costs of one trip of the loop in this named scope, if there is one."""
        loop = self._program.loop(scope)
        if loop is None:
            return None
        total = Costs()
        for part in loop.computations("condition", "body"):
            total.add(self.of(part))
        return total

    def _add(self, total: Costs, computation: Computation, instruction: Instruction, seen) -> None:
        """Adds one instruction. seen: channels of what this computation has sent already."""
        match instruction.opcode:
            case "while":
                total.control["while", self._in_layer(instruction)] += 1
                count = self._program.trip_count(computation, instruction)
                count = self._trips(instruction.op_name) if count is None else count
                if count is None:
                    total.unknown_loops.add(instruction.op_name or instruction.name)
                    count = 1
                for part in instruction.computations("condition", "body"):
                    total.add(self.of(part), count)
            case "conditional":
                self._add_branches(total, instruction)
            case "call" | "async-start":
                for name in instruction.computations("calls", "to_apply"):
                    total.add(self.of(name))
            case "fusion":
                # Its own estimate stands for all that is in it, but for what it sends.
                self._add_operation(total, computation, instruction)
                for name in instruction.computations("calls"):
                    scatters = name.startswith("all-reduce-scatter")
                    for one, count in self.of(name).collectives.items():
                        if one.channel in seen:
                            continue
                        seen |= {one.channel} - {None}
                        total.collectives[_scattered(one) if scatters else one] += count
            case _:
                self._add_operation(total, computation, instruction)
                found = _collective(computation, instruction, self._mesh)
                if found is not None and found.channel not in seen:
                    seen |= {found.channel} - {None}
                    total.collectives[found] += 1

    def _add_branches(self, total: Costs, conditional: Instruction) -> None:
        """The dearest branch, or as large a share of it as `trips` says for this name. Of loops and
        conditionals, those of the branch that has most."""
        inside = self._in_layer(conditional)
        total.control["conditional", inside] += 1
        roles = ("branch_computations", "true_computation", "false_computation")
        branches = [self.of(name) for name in conditional.computations(*roles)]
        branches.sort(key=lambda branch: (branch.seconds, branch.cycles))
        share = None if inside else self._trips(conditional.op_name)
        share = 1.0 if share is None else share
        total.add(branches[-1], share)
        if share < 1:
            total.add(branches[0], 1 - share)
        for key in {key for branch in branches for key in branch.control}:
            counted = share * branches[-1].control[key] + (1 - share) * branches[0].control[key]
            total.control[key] += max(branch.control[key] for branch in branches) - counted

    def _add_operation(self, total: Costs, computation: Computation, one: Instruction) -> None:
        cycles = one.estimated_cycles
        flops = operation_flops(self._program, computation, one)
        moved = moved_bytes(self._program, computation, one)
        total.seconds += self._chip.seconds(cycles, flops, moved)
        total.cycles += cycles
        total.flops += flops
        total.bytes += moved
        if runs(one):
            total.operations += 1
            total.layer_operations += self._in_layer(one)
        if one.opcode == "custom-call" and runs(one):
            total.kernels[one.kernel, largest_operand(computation, one)] += 1

    def _in_layer(self, instruction: Instruction) -> bool:
        return self._program.comes_from(instruction, LAYER)


def program_costs(program: Program, mesh: Mapping[str, int], trips: Trips, chip: Chip) -> Costs:
    """Costs of one run of a program; see `Counting`."""
    return Counting(program, mesh, trips, chip).of(program.entry)


def _collective(computation: Computation, instruction: Instruction, mesh) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    groups = _groups(instruction.attributes, math.prod(mesh.values()))
    operands = (computation.instructions.get(name) for name in instruction.operands)
    result = instruction.shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        result = started(result)
    sides = [bare("".join(found.shape for found in operands if found)), bare(result)]
    shape = max(sides, key=shape_bytes)
    sent, channel = _sent(kind, shape, groups), instruction.attribute(r"channel_id=(\d+)")
    return Collective(kind, _axes(groups, mesh), shape, sent, instruction.op_name, channel)


def _sent(kind: str, shape: str, groups: np.ndarray) -> int:
    size = groups.shape[1]
    share = {"collective-permute": 1, "all-reduce": 2 * (size - 1) / size}
    return int(share.get(kind, (size - 1) / size) * shape_bytes(shape))


def _scattered(one: Collective) -> Collective:
    """An all-reduce of which each device keeps its share is a reduce-scatter."""
    return one._replace(kind="reduce-scatter", sent=one.sent // 2)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices of each] that work together, from any of the ways to write that."""
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if pairs:
        rows = re.findall(r"\{([\d,]+)\}", pairs.group(1))
        return np.array([[int(device) for device in row.split(",")] for row in rows])
    # [2,4]<=[4,2]T(1,0): 0..7 as [4, 2], transposed, as [2, 4]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota.group(2)).reshape(_numbers(iota.group(1)))
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: along some axes of a mesh
    named = re.search(r"replica_groups=mesh\[([^\]]+)\](.*?)\{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", named.group(2))
        ids = np.arange(devices) if order is None else _iota(order.group(1))
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named.group(3))]
        ids = np.moveaxis(ids.reshape(tuple(sizes.values())), along, range(-len(along), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(along) :]))
    return np.arange(devices)[None]  # {}: all of them


def _iota(text: str) -> np.ndarray:
    sizes, _, order = text.partition("T")
    sizes = _numbers(sizes.strip("[]"))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_numbers(order.strip("()"))) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    differ = ((place != place[:, :1]).any() for place in places)
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
