"""Reads the text of a compiled program (optimized HLO), as far as its costs need it.

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0:T(8)} get-tuple-element(%p), index=1
  %sum = f32[8]{0:T(8)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ...
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lsjax.aot.frames import stack_functions

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclass(frozen=True)
class Instruction:
    """One line: %name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # their names; of a constant its value
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """What the group of the pattern finds in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found.group(1)

    def computations(self, *roles: str) -> list[str]:
        """Names of the computations that it calls in these roles ("body", "calls" ...)."""
        names = []
        for role in roles:
            found = self.attribute(rf"\b{role}=({{[^}}]*}}|%?[\w.\-]+)")
            names += re.findall(r"[\w.\-]+", found or "")
        return names

    @property
    def op_name(self) -> str:
        """Where jax made it: jit(step)/scope/while/body/dot_general."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """Target of a custom call; "" for others."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def kernel(self) -> str:
        """Name of a custom call's kernel: as Pallas calls it, or the target."""
        if self.target == "tpu_custom_call":
            return re.sub(r"[.\d]+$", "", self.name)
        found = re.search(r"([^/]+)/pallas_call$", self.op_name)
        return found.group(1) if found else self.target

    @property
    def estimated_cycles(self) -> int:
        """The TPU compiler's estimate; 0 where it gives none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(self.attribute(r"\bindex=(\d+)") or 0)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run; the last one gives the result unless marked."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """Who takes a result, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for index, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, index))
        return found

    @cached_property
    def parameters(self) -> Mapping[int, str]:
        """Their names by number."""
        return {
            int(instruction.operands[0]): instruction.name
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        }

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """What computes an operand, copies and casts looked through."""
        if index >= len(instruction.operands):
            return None
        found = self.instructions.get(instruction.operands[index])
        while found is not None and found.opcode in ("copy", "bitcast", "convert", "copy-done"):
            source = self.operand(found, 0)
            if found.opcode == "copy-done" and source is not None:
                source = self.operand(source, 0)  # of the copy-start
            found = source
        return found

    def passes_on(self, element: Instruction) -> bool:
        """Whether the body of a loop gives this element of what it carries on as it is."""
        source, result = self.operand(element, 0), self.instructions[self.root]
        if source is None or source.opcode != "parameter" or result.opcode != "tuple":
            return False
        given = self.operand(result, element.index)
        return (
            given is not None
            and given.opcode == "get-tuple-element"
            and given.index == element.index
            and self.operand(given, 0) is source
        )


@dataclass(frozen=True)
class Program:
    """All computations of a compiled program."""

    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Functions on the stack of each frame."""

    def comes_from(self, instruction: Instruction, prefix: str) -> bool:
        """Whether jax made it in a call of a function whose name begins so ("Block.")."""
        frame = int(instruction.attribute(r"\bstack_frame_id=(\d+)") or 0)
        return any(name.startswith(prefix) for name in self.frames.get(frame, ()))

    def loop(self, scope: str) -> Instruction | None:
        """The loop in the named scope jit(run)/.../SCOPE/while."""
        loops = (instruction for _, instruction in self.called_by.values())
        return next((loop for loop in loops if loop.op_name.endswith(f"/{scope}/while")), None)

    @cached_property
    def called_by(self) -> Mapping[str, tuple[Computation, Instruction]]:
        """The loop that a computation is the body of, and where that loop stands."""
        return {
            body: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
            for body in instruction.computations("body")
        }

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often the body of a `while` in this computation runs, where the program says so: as
        an attribute, or by a counter that is compared with a constant."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known is not None:
            return int(known)
        (condition,) = (self.computations[name] for name in loop.computations("condition"))
        compare = condition.instructions[condition.root]
        if compare.opcode != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
            return None
        counter, limit = condition.operand(compare, 0), condition.operand(compare, 1)
        if counter is None or counter.opcode != "get-tuple-element":
            return None
        start = self._carried(computation, loop, counter)
        end = _constant(limit)
        if end is None and limit is not None and limit.opcode == "get-tuple-element":
            end = self._carried(computation, loop, limit)
        if start is None or end is None:
            return None
        return max(0, -(-(end - start) // self._step(loop, counter)))

    def _carried(self, computation: Computation, loop: Instruction, element: Instruction):
        """The constant that a loop starts with in an element of what it carries; looked for in the
        loops around it too, whose invariants it may be."""
        index = element.index
        carry = computation.operand(loop, 0)
        if carry is None or carry.opcode != "tuple":
            return None
        first = computation.operand(carry, index)
        value = _constant(first)
        if value is None and first is not None and first.opcode == "get-tuple-element":
            around = self.called_by.get(computation.name)
            if around is not None and computation.passes_on(first):
                return self._carried(*around, first)
        return value

    def _step(self, loop: Instruction, counter: Instruction) -> int:
        """What the body adds to the counter; 1 where that can't be read."""
        (body,) = (self.computations[name] for name in loop.computations("body"))
        result = body.instructions[body.root]
        if result.opcode != "tuple":
            return 1
        added = body.operand(result, counter.index)
        if added is None or added.opcode != "add":
            return 1
        steps = (_constant(body.operand(added, index)) for index in (0, 1))
        return next((step for step in steps if step), 1)


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not line.startswith((" ", "}")):
            header = _COMPUTATION.match(line)
            if header:
                name, instructions, root = header.group(2), {}, ""
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            root = root or next(reversed(instructions), "")
            computations[name] = Computation(name, instructions, root)
        else:
            found = _NAME.match(line)
            if found:
                instruction = _instruction(found.group(2), line[found.end() :])
                instructions[instruction.name] = instruction
                root = instruction.name if found.group(1) else root
    return Program(computations, entry, stack_functions(text))


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    operands = re.findall(r"%([\w.\-]+)", arguments) or [arguments.strip()]
    return Instruction(name, shape, rest[:opening], tuple(operands), rest[closing:])


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens there is closed: the position behind it."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket.group() == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def _constant(instruction: Instruction | None) -> int | None:
    """The value of an integer constant."""
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.operands[0]
    return int(value) if re.fullmatch(r"-?\d+", value) else None
