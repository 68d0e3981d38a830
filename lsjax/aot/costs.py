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
from lsjax.aot.hlo import Computation, HloModule, Instruction, arrays, shape_bytes
from lsjax.aot.operations import COLLECTIVES, largest_operand, moved_bytes, operation_flops, runs

LAYER = "Block."  # methods of the model's layers
# Regular expression of a loop's op_name -> its trips; of a conditional's -> the share of runs that
# take the dearest branch. The first that matches counts.
Trips = Mapping[str, float]


class Collective(NamedTuple):
    """Communication between devices."""

    kind: str  # one of COLLECTIVES
    axes: tuple[str, ...]  # of the mesh
    shape: str  # the larger side: what is gathered, reduced, or exchanged
    sent: int  # bytes that leave each device, by ring algorithms
    op_name: str
    channel: str | None  # shared by the parts that the compiler spreads over several fusions

    @property
    def bytes(self) -> int:
        """Bytes of the larger side."""
        return shape_bytes(self.shape)


@dataclass
class ProgramCosts:
    """Costs of one run of a program, or of a part of it."""

    amounts: Counter[str] = field(default_factory=Counter)
    """seconds, one operation after the other; cycles; flops of products outside of a TPU's own
    operations, and of attention kernels; bytes read from the device's memory and written to it."""
    runs: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Runs of each "operation" (kernel, on GPUs), "while" and "conditional", and whether in a
    layer."""
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Custom kernels: name and largest operand."""
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: "ProgramCosts", times: float = 1) -> None:
        """Adds so many runs of a part."""
        for name in ("amounts", "runs", "collectives", "kernels"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] += times * count
        self.unknown_loops |= other.unknown_loops

    def all_runs(self, kind: str) -> float:
        """Runs in layers and outside."""
        return self.runs[kind, True] + self.runs[kind, False]

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
        return self.computation(self.module.entry)

    def loop(self, scope: str) -> tuple[ProgramCosts, ProgramCosts]:
        """Costs of one trip of the loop in this named scope, which has to count once, and of all
        else."""
        each, once = self._trip(self.module.loop(scope)), ProgramCosts()
        once.add(self.program())
        once.add(each, -1)
        return each, once

    def computation(self, name: str) -> ProgramCosts:
        """Costs of one run of a computation."""
        if name not in self._known:
            self._known[name] = total = ProgramCosts()
            computation, seen = self.module.computations[name], set()
            for one in computation.instructions.values():
                self._add(total, computation, one)
                for collective, count in self._sent(computation, one).items():
                    # A channel that was seen belongs to a part of the same collective.
                    if collective.channel not in seen:
                        seen |= {collective.channel} - {None}
                        total.collectives[collective] += count
        return self._known[name]

    def _trip(self, loop: Instruction) -> ProgramCosts:
        total = ProgramCosts()
        for part in loop.computations("condition", "body"):
            total.add(self.computation(part))
        return total

    def _add(self, total: ProgramCosts, computation: Computation, one: Instruction) -> None:
        """Adds one instruction, but for what an operation sends."""
        match one.opcode:
            case "while":
                total.runs["while", self._in_layer(one)] += 1
                count = self.module.trip_count(one)
                count = self._named(one) if count is None else count
                if count is None:
                    total.unknown_loops.add(one.op_name or one.name)
                total.add(self._trip(one), 1 if count is None else count)
            case "conditional":
                self._add_branches(total, one)
            case "call" | "async-start":
                for name in one.computations("calls", "to_apply"):
                    total.add(self.computation(name))
            case _:
                self._add_operation(total, computation, one)

    def _add_branches(self, total: ProgramCosts, conditional: Instruction) -> None:
        """The dearest branch, or as large a share of it as `trips` says for this name. Of loops and
        conditionals, those of the branch that has most."""
        inside = self._in_layer(conditional)
        total.runs["conditional", inside] += 1
        roles = ("branch_computations", "true_computation", "false_computation")
        branches = [self.computation(name) for name in conditional.computations(*roles)]
        branches.sort(key=lambda branch: (branch.amounts["seconds"], branch.amounts["cycles"]))
        share = None if inside else self._named(conditional)
        mean = ProgramCosts()
        mean.add(branches[-1], 1 if share is None else share)
        if share is not None:
            mean.add(branches[0], 1 - share)
        for key in {key for branch in branches for key in branch.runs if key[0] != "operation"}:
            mean.runs[key] = max(branch.runs[key] for branch in branches)
        total.add(mean)

    def _add_operation(self, total: ProgramCosts, computation: Computation, one: Instruction):
        """A fusion's own figures stand for all that is in it."""
        cycles = int(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)  # on TPUs
        flops = operation_flops(self.module, computation, one)
        moved = moved_bytes(self.module, computation, one)
        seconds = self.chip.seconds(cycles, flops, moved)
        total.amounts.update(seconds=seconds, cycles=cycles, flops=flops, bytes=moved)
        if runs(one):
            total.runs["operation", self._in_layer(one)] += 1
            if one.opcode == "custom-call":
                total.kernels[one.kernel, str(largest_operand(computation, one) or "")] += 1

    def _named(self, one: Instruction) -> float | None:
        """Trips or share by the name of a loop or conditional."""
        found = (n for name, n in self.trips.items() if re.search(name, one.op_name))
        return next(found, None)

    def _in_layer(self, one: Instruction) -> bool:
        return self.module.comes_from(one, LAYER)

    def _sent(self, computation: Computation, one: Instruction) -> Mapping[Collective, float]:
        """What an operation sends."""
        if one.opcode == "fusion":
            (name,) = one.computations("calls")
            found = self.computation(name).collectives
            if not name.startswith("all-reduce-scatter"):
                return found
            # An all-reduce of which each device keeps its share is a reduce-scatter.
            kind = "reduce-scatter"
            return {o._replace(kind=kind, sent=o.sent // 2): n for o, n in found.items()}
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return {}
        users = (user for user, _ in computation.users.get(one.name, ()))
        done = next((user for user in users if user.opcode == f"{kind}-done"), one)
        operands = (computation.instructions.get(name) for name in one.operands)
        sides = ("".join(operand.shape for operand in operands if operand), done.shape)
        shape = max((", ".join(map(str, arrays(side))) for side in sides), key=shape_bytes)
        groups = device_groups(one.attributes, math.prod(self.mesh.values()))
        size = groups.shape[1]
        share = {"collective-permute": 1, "all-reduce": 2 * (size - 1) / size}
        sent = int(share.get(kind, (size - 1) / size) * shape_bytes(shape))
        axes, channel = _axes(groups, self.mesh), one.attribute(r"channel_id=(\d+)") or None
        return {Collective(kind, axes, shape, sent, one.op_name, channel): 1}


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices of each] that communicate, from any of the ways to write that."""
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if pairs:
        return np.array([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
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
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    differ = ((place != place[:, :1]).any() for place in places)
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
