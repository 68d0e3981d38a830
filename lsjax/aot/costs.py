"""What one run of a compiled program costs: cycles and what devices send, a loop's body counted as
often as it runs.

Of a conditional the branch with the most cycles counts. Loops whose number of trips the program
does not say are looked up by their name; those without one count once and are listed.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lsjax.aot.hlo import Computation, Instruction, Program, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# op_name of a loop -> its trips, None if they are not known
Trips = Callable[[str], float | None]


class Collective(NamedTuple):
    """What devices do together."""

    kind: str  # one of KINDS
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

    cycles: float = 0.0
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Custom kernels, for which the compiler has no estimate: name and largest operand."""
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: "Costs", times: float = 1) -> None:
        """Adds so many runs of a part."""
        self.cycles += times * other.cycles
        for mine, others in (
            (self.collectives, other.collectives),
            (self.kernels, other.kernels),
        ):
            for key, count in others.items():
                mine[key] += times * count
        self.unknown_loops |= other.unknown_loops


def program_costs(program: Program, mesh: Mapping[str, int], trips: Trips) -> Costs:
    """Costs of a run. mesh: sizes of its axes, in order; the devices of the program count along the
    last axis first."""
    done: dict[str, Costs] = {}

    def of(name: str) -> Costs:
        if name not in done:
            done[name] = total = Costs()
            computation, seen = program.computations[name], set()
            for instruction in computation.instructions.values():
                _add(total, program, computation, instruction, mesh, trips, of, seen)
        return done[name]

    return of(program.entry)


def _add(total, program, computation, instruction, mesh, trips, of, seen) -> None:
    """Adds one instruction. seen: channels of what this computation has sent already."""
    match instruction.opcode:
        case "while":
            count = program.trip_count(computation, instruction)
            count = trips(instruction.op_name) if count is None else count
            if count is None:
                total.unknown_loops.add(instruction.op_name or instruction.name)
                count = 1
            for part in instruction.computations("condition", "body"):
                total.add(of(part), count)
        case "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = [of(name) for name in instruction.computations(*roles)]
            total.add(max(branches, key=lambda branch: branch.cycles))
        case "call" | "async-start":
            for name in instruction.computations("calls", "to_apply"):
                total.add(of(name))
        case "fusion":
            # Its own estimate stands for all that is in it, but for what it sends.
            total.cycles += instruction.estimated_cycles
            for name in instruction.computations("calls"):
                inner = of(name)
                scatters = name.startswith("all-reduce-scatter")
                for one, count in inner.collectives.items():
                    if one.channel in seen:
                        continue
                    seen |= {one.channel} - {None}
                    total.collectives[_scattered(one, mesh) if scatters else one] += count
        case "custom-call" if instruction.attribute(r'custom_call_target="(tpu_custom_call)"'):
            operands = (computation.instructions.get(name) for name in instruction.operands)
            shapes = [operand.shape for operand in operands if operand is not None]
            kernel = re.sub(r"[.\d]+$", "", instruction.name)
            total.kernels[kernel, _bare(max(shapes, key=shape_bytes, default=""))] += 1
        case _:
            total.cycles += instruction.estimated_cycles
            found = _collective(computation, instruction, mesh)
            if found is not None and found.channel not in seen:
                seen |= {found.channel} - {None}
                total.collectives[found] += 1


def _collective(computation: Computation, instruction: Instruction, mesh) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = _groups(instruction.attributes, math.prod(mesh.values()))
    operands = (computation.instructions.get(name) for name in instruction.operands)
    sides = [_bare("".join(found.shape for found in operands if found)), _bare(instruction.shape)]
    if instruction.opcode.endswith("-start"):
        sides = sides[:1] if kind == "all-reduce" else [sides[0], _last(instruction.shape)]
    shape = max(sides, key=shape_bytes)
    sent, channel = _sent(kind, shape, groups), instruction.attribute(r"channel_id=(\d+)")
    return Collective(kind, _axes(groups, mesh), shape, sent, instruction.op_name, channel)


def _sent(kind: str, shape: str, groups: np.ndarray) -> int:
    size = groups.shape[1]
    share = {"collective-permute": 1, "all-reduce": 2 * (size - 1) / size}
    return int(share.get(kind, (size - 1) / size) * shape_bytes(shape))


def _scattered(one: Collective, mesh: Mapping[str, int]) -> Collective:
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


def _bare(shape: str) -> str:
    """Without layouts."""
    return ", ".join(re.findall(r"[a-z]+\d*[a-z\d]*\[[\d,]*\]", shape))


def _last(shape: str) -> str:
    """The result in the shape of an asynchronous start: (operand, result, ...)."""
    arrays = _bare(shape).split("], ")
    return max((f"{array.rstrip(']')}]" for array in arrays), key=shape_bytes)
