"""Bytes that an operation of a compiled program moves to and from the device's memory.

An operand counts in full, unless the operation reads a slice of it. An update in place counts what
it writes. On TPUs, the fast memory of a core is free; what was fetched there ahead of time counts
where it is used.
"""

import re

from lsjax.aot.hlo import Computation, Instruction, Program
from lsjax.aot.shapes import arrays, shape_bytes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Operations that move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
}
# Custom calls that run on the device; Pallas calls Triton's by two names.
KERNEL = re.compile(r"tpu_custom_call|__cu|cub|__gpu\$xla\.gpu\.triton|triton_kernel_call")
_SAME_ELEMENTS = ("bitcast", "convert", "copy", "reshape", "transpose")


def runs(instruction: Instruction) -> bool:
    """Whether it is an operation (a kernel, on GPUs) that runs on the device and computes."""
    opcode = instruction.opcode
    if opcode == "custom-call":
        return KERNEL.match(instruction.target) is not None
    asynchronous = opcode.endswith(("-start", "-update", "-done"))
    return not (opcode in FREE or opcode in COLLECTIVES or asynchronous)


def moved_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """What it reads and writes."""
    if not runs(instruction):
        return 0.0
    total = _written(program, computation, instruction)
    for index, name in enumerate(instruction.operands):
        operand = computation.instructions.get(name)
        if operand is None or not _from_memory(computation, operand):
            continue
        size = shape_bytes(operand.shape)
        used = _used(program, computation, instruction, index, inside=False)
        total += size * min(1.0, used / max(1, _elements(operand.shape)))
    return total


def _from_memory(computation: Computation, operand: Instruction) -> bool:
    """Whether its bytes come from the device's memory, now or by a copy ahead of time."""
    if all(array.in_memory for array in arrays(operand.shape)):
        return True
    if operand.opcode in ("bitcast", "get-tuple-element") or operand.target == "ConcatBitcast":
        source = computation.instructions.get(operand.operands[0])
        return source is not None and _from_memory(computation, source)
    return operand.opcode in ("copy-done", "slice-done")


def _elements(shape: str) -> int:
    return sum(array.elements for array in arrays(shape))


def _used(
    program: Program,
    computation: Computation,
    user: Instruction,
    index: int,
    inside: bool = True,
    result: bool = True,
) -> float:
    """Elements of an operand that are read. inside: a fusion, where results of parts are not
    stored. result: what the fusion gives as it is counts as read."""
    own = _elements(computation.instructions[user.operands[index]].shape)
    match user.opcode:
        case "fusion":
            (name,) = user.computations("calls")
            called = program.computations[name]
            return _read(program, called, called.parameters[index])
        case "dynamic-slice" | "slice" | "gather" if index == 0:
            return _elements(user.shape)
        case "dynamic-update-slice" | "scatter" if index == 0:
            # In place: only what others read of the result is read.
            return _read(program, computation, user.name, result=False) if inside else 0.0
        case opcode if inside and opcode in _SAME_ELEMENTS:
            return _read(program, computation, user.name, result)
        case "tuple":
            return own if result else 0.0
    return own


def _read(program: Program, computation: Computation, name: str, result: bool = True) -> float:
    """Elements of a value in a fusion that are read."""
    own = _elements(computation.instructions[name].shape)
    total = float(own if result and name == computation.root else 0)
    for user, index in computation.users.get(name, ()):
        total += _used(program, computation, user, index, result=result)
    return min(own, total)


def _written(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of the results; of an update in place, of what is new: of a kernel's, nothing."""
    results = arrays(instruction.shape)
    if instruction.opcode == "custom-call":
        # {{2}: (4, {}), {3}: (5, {})}: results 2 and 3 lie where operands 4 and 5 did.
        aliases = instruction.attribute(r"output_to_operand_aliasing=\{(.*?\}\))\}") or ""
        in_place = {int(number) for number in re.findall(r"\{(\d+)\}: \(", aliases)}
        results = [array for index, array in enumerate(results) if index not in in_place]
    sources: list[Instruction | None] = [instruction]
    place = computation
    while sources[0] is not None and sources[0].opcode == "fusion" and len(sources) == 1:
        (name,) = sources[0].computations("calls")
        place = program.computations[name]
        root = place.instructions[place.root]
        names = root.operands if root.opcode == "tuple" else (root.name,)
        sources = [_unchanged(place, place.instructions.get(name)) for name in names]
    if len(sources) != len(results):
        return sum(array.bytes for array in results if array.in_memory)
    total = 0.0
    for array, source in zip(results, sources, strict=True):
        if array.in_memory:
            share = _new(place, source) / max(1, array.elements)
            total += array.bytes * min(1.0, share)
    return total


def _unchanged(computation: Computation, found: Instruction | None) -> Instruction | None:
    """The operation behind casts and other views of its result."""
    while found is not None and found.opcode in _SAME_ELEMENTS:
        source = computation.instructions.get(found.operands[0])
        if source is None or source.opcode == "parameter":
            break
        found = source
    return found


def _new(computation: Computation, source: Instruction | None) -> float:
    """Elements of a result that an operation writes."""
    if source is None:
        return float("inf")
    if source.opcode in ("dynamic-update-slice", "scatter"):
        update = source.operands[1 if source.opcode == "dynamic-update-slice" else -1]
        return _elements(computation.instructions[update].shape)
    return _elements(source.shape)
