"""Counts the bytes that pass between a device and its memory (HBM).

A computation on a TPU may keep arrays in the fast memory of its core. Only the copies between this
memory and HBM count, in both directions, each once and at the time of the copy. An operand in HBM
counts in full, unless the operation reads a slice of it. An in-place update counts the bytes that
it writes. Collectives count nothing: `costs` lists them.
"""

import re
from collections.abc import Iterator

from lsjax.aot.hlo import HloArray, Instruction, runs

# Asynchronous operations that only copy; each is a start and a done.
COPIES = {"copy-done", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done"}
VIEWS = ("bitcast", "convert", "copy", "reshape", "transpose")


def moved_bytes(one: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes there. Only the end of an asynchronous
    copy counts, not its start."""
    if one.opcode in COPIES:
        return copied_bytes(one)
    if not runs(one):
        return 0.0
    total, new = 0.0, _new_elements(one)
    if one.opcode == "custom-call":
        # {{2}: (4, {}), {3}: (5, {})}: results 2 and 3 share the memory of operands 4 and 5.
        aliases = one.attribute(r"output_to_operand_aliasing=\{(.*?\}\))\}")
        for index in re.findall(r"\{(\d+)\}: \(", aliases):
            new[int(index)] = 0
    for array, elements in zip(one.arrays, new, strict=True):
        total += in_memory([array]) * min(1.0, elements / max(1, array.elements))
    for index, operand in enumerate(one.operands):
        share = _used(one, index, inside=False) / max(1, operand.elements)
        total += in_memory(operand.arrays) * min(1.0, share)
    return total


def in_memory(arrays: list[HloArray]) -> float:
    """Bytes of those arrays that are in HBM."""
    return sum(array.bytes for array in arrays if array.in_memory)


def copied_bytes(done: Instruction) -> float:
    """Bytes that an asynchronous copy reads from HBM and writes there."""
    start = done.operands[0]
    source, moved = start.operands[0], done.arrays[0].bytes
    if done.opcode == "dynamic-update-slice-done":
        source = start.operands[1]
        moved = source.arrays[0].bytes
    return moved * (source.arrays[0].in_memory + done.arrays[0].in_memory)


def is_prefetch(done: Instruction) -> bool:
    """Whether this ends a copy from HBM to the fast memory."""
    return done.opcode in COPIES and not done.arrays[0].in_memory


def prefetched(one: Instruction) -> Iterator[Instruction]:
    """Ends of the prefetches that an instruction reads, itself or by views."""
    for operand in one.operands:
        if is_prefetch(operand):
            yield operand
        elif operand.opcode == "bitcast" or operand.target == "ConcatBitcast":
            yield from prefetched(operand)


def _used(user: Instruction, index: int, inside: bool = True, result: bool = True) -> float:
    """Number of elements of an operand that are read. inside: within a fusion, which stores no
    intermediate results. result: an operand that the fusion returns counts as read."""
    match user.opcode:
        case "fusion":
            inner = user.called["calls"][0].instructions.values()
            named = (p for p in inner if p.opcode == "parameter" and int(p.inputs) == index)
            return _read(next(named))
        case "dynamic-slice" | "slice" | "gather" if index == 0:
            return user.elements
        case "dynamic-update-slice" | "scatter" if index == 0:
            # In place: only elements of the result that others read are read.
            return _read(user, result=False) if inside else 0.0
        case opcode if inside and opcode in VIEWS:
            return _read(user, result)
        case "tuple" if not result:
            return 0.0
    return user.operands[index].elements


def _read(one: Instruction, result: bool = True) -> float:
    """Number of elements of a value in a fusion that are read."""
    total = one.elements if result and one is one.inside.root else 0
    total += sum(_used(user, index, result=result) for user, index in one.users)
    return min(one.elements, total)


def _new_elements(one: Instruction, inside: bool = False) -> list[int]:
    """Number of elements of each result that an operation writes. inside: within a fusion, where a
    view has the elements that its operand writes."""
    if inside and one.opcode in VIEWS and one.operands[0].opcode != "parameter":
        return _new_elements(one.operands[0], inside)
    if one.opcode == "fusion":
        root = one.called["calls"][0].root
        sources = root.operands if root.opcode == "tuple" else [root]
        return [new for source in sources for new in _new_elements(source, inside=True)]
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return [one.operands[1 if one.opcode == "dynamic-update-slice" else -1].elements]
    return [array.elements for array in one.arrays]
