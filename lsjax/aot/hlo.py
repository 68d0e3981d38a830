"""Reads the text of a compiled program (optimized HLO), as far as its costs need it.

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0:T(8)} get-tuple-element(%p), index=1
  %sum = f32[8]{0:T(8)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ...
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# Types whose names do not say their bits, as those of bf16 and f8e4m3 do.
BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,<=]*)\](\{[^}]*\})?")
_FRAME = r"^(\d+) {(?:file_location_id=(\d+))? ?(?:parent_frame_id=(\d+))?}$"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")


class HloArray(NamedTuple):
    """One array of a shape: bf16[8,128]{1,0:T(8,128)S(1)}."""

    kind: str
    sizes: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        """The array without its layout."""
        return f"{self.kind}[{','.join(map(str, self.sizes))}]"

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        bits = BITS.get(self.kind)
        return self.elements * (int(re.search(r"\d+", self.kind)[0]) if bits is None else bits) / 8

    @property
    def in_memory(self) -> bool:
        """Whether it is in the device's memory. S(1) is the fast memory of a TPU's core."""
        return "S(" not in self.layout


def arrays(shape: str) -> list[HloArray]:
    """The arrays of a shape, tuples flattened."""
    return [
        HloArray(kind, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays in a tuple, "(f32[8,128]{1,0}, s32[])"."""
    return int(sum(array.bytes for array in arrays(shape)))


@dataclass(frozen=True)
class Instruction:
    """One line: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names of instructions; the value of a constant
    attributes: str

    def attribute(self, pattern: str) -> str:
        """What the pattern's group finds in the attributes; "" if nothing."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    def computations(self, *roles: str) -> list[str]:
        """Names of the computations that it calls in these roles ("body", "calls" ...)."""
        found = (self.attribute(rf"\b{role}=({{[^}}]*}}|%?[\w.\-]+)") for role in roles)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    @property
    def op_name(self) -> str:
        """Where jax made it: jit(step)/scope/while/body/dot_general."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """Target of a custom call; "" for other instructions."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def kernel(self) -> str:
        """Name of a custom call's kernel: as Pallas calls it, or the target."""
        if self.target == "tpu_custom_call":
            return re.sub(r"[.\d]+$", "", self.name)
        found = re.search(r"([^/]+)/pallas_call$", self.op_name)
        return found.group(1) if found else self.target


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run; the root gives the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """The instructions that take a result, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for index, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, index))
        return found

    @cached_property
    def parameters(self) -> Mapping[int, str]:
        """Names of the parameters by number."""
        every = self.instructions.values()
        return {int(one.operands[0]): one.name for one in every if one.opcode == "parameter"}

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that computes an operand, looked for behind copies and casts."""
        names = instruction.operands[index : index + 1]
        found = self.instructions.get(names[0]) if names else None
        if found is None or found.opcode not in ("copy", "bitcast", "convert", "copy-done"):
            return found
        if found.opcode == "copy-done":
            found = self.instructions[found.operands[0]]  # its copy-start
        return self.operand(found, 0)

    def carried(self, element: Instruction | None) -> int | None:
        """The index of this element of the parameter, the tuple that a loop carries; else None."""
        if element is None or element.opcode != "get-tuple-element":
            return None
        source = self.operand(element, 0)
        if source is None or source.opcode != "parameter":
            return None
        return int(element.attribute(r"\bindex=(\d+)"))

    def element(self, source: Instruction | None, index: int) -> Instruction | None:
        """An element of a tuple that is made here."""
        return self.operand(source, index) if source and source.opcode == "tuple" else None


@dataclass(frozen=True)
class HloModule:
    """All computations of a compiled program."""

    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Functions on the stack of each frame."""

    def comes_from(self, instruction: Instruction, prefix: str) -> bool:
        """Whether jax made it in a call of a function whose name begins so ("Block.")."""
        frame = int(instruction.attribute(r"\bstack_frame_id=(\d+)") or 0)
        return any(name.startswith(prefix) for name in self.frames.get(frame, ()))

    @cached_property
    def loops(self) -> Mapping[str, tuple[Computation, Instruction]]:
        """The loop that a computation is the body or condition of, and where that loop is."""
        return {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
            for name in instruction.computations("condition", "body")
        }

    def loop(self, scope: str) -> Instruction:
        """The loop in the named scope jit(run)/.../SCOPE/while."""
        for _, loop in self.loops.values():
            if loop.op_name.endswith(f"/{scope}/while"):
                return loop
        raise ValueError(f"the program has no loop {scope!r}")

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, where the program says so: as an attribute, or by a
        counter that is compared with a constant."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        around, _ = self.loops[loop.computations("body")[0]]
        condition, body = (
            self.computations[name] for name in loop.computations("condition", "body")
        )
        compare = condition.root
        counter = condition.carried(condition.operand(compare, 0))
        if counter is None or "direction=LT" not in compare.attributes:
            return None
        start = self._constant(around, around.element(around.operand(loop, 0), counter))
        end = self._constant(condition, condition.operand(compare, 1))
        if start is None or end is None:
            return None
        added = body.element(body.root, counter)
        steps = [1]
        if added is not None and added.opcode == "add":
            steps = [self._constant(body, body.operand(added, index)) for index in (0, 1)] + steps
        return max(0, -(-(end - start) // next(filter(None, steps))))

    def _constant(self, computation: Computation, value: Instruction | None) -> int | None:
        """An integer that is known before the program runs: a constant, or what loops carry as it
        is from a constant on."""
        while value is not None and value.opcode != "constant":
            index = computation.carried(value)
            if index is None or computation.name not in self.loops:
                return None
            around, loop = self.loops[computation.name]
            body = self.computations[loop.computations("body")[0]]
            if body.carried(body.element(body.root, index)) != index:
                return None
            computation, value = around, around.element(around.operand(loop, 0), index)
        text = value.operands[0] if value is not None else ""
        return int(text) if re.fullmatch(r"-?\d+", text) else None


def parse(text: str) -> HloModule:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        if line.startswith("}") and instructions:
            last = next(reversed(instructions.values()))
            computations[name] = Computation(name, instructions, instructions.get(root, last))
        elif found := _COMPUTATION.match(line):
            name, instructions, root = found.group(2), {}, ""
            entry = name if found.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            is_root, result, shape, opcode, inputs, attributes = found.groups()
            operands = re.findall(r"%([\w.\-]+)", inputs) or [inputs.strip()]
            instructions[result] = Instruction(result, shape, opcode, tuple(operands), attributes)
            root = result if is_root else root
    return HloModule(computations, entry, stack_functions(text))


def stack_functions(text: str) -> Mapping[int, frozenset[str]]:
    """The functions on the stack of each frame, by the tables at the head of a program: functions,
    lines of files, frames. Empty where there are no tables."""
    _, _, tables = text.partition("\nFunctionNames\n")
    names = dict(re.findall(r'^(\d+) "(.*)"$', tables, re.M))
    lines = dict(re.findall(r"^(\d+) {file_name_id=\d+ function_name_id=(\d+)", tables, re.M))
    frames = re.findall(_FRAME, tables, re.M)
    # jax 0.10 writes parents one too high, and 1 for the root, which has none.
    shift = int(bool(frames) and frames[0][2] == "1")
    found: dict[int, frozenset[str]] = {}
    for frame, line, parent in frames:
        name = names.get(lines.get(line))
        above = found.get(int(parent or 0) - shift, frozenset())
        found[int(frame)] = above | ({name} - {None})
    return found
