"""Parses the text of a compiled program (optimized HLO), and counts FLOPs by operation.

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0:T(8)} get-tuple-element(%p), index=1
  %sum = f32[8]{0:T(8)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ...

Only matmuls and attention kernels have FLOPs. lsjax/aot/traffic.py counts bytes.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no data themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
}
# Custom calls that run on the device. Pallas has two names for Triton's.
KERNEL = re.compile(r"tpu_custom_call|__cu|cub|__gpu\$xla\.gpu\.triton|triton_kernel_call")
# Part of a kernel's name -> its attention, its number of [T, S] by [S, H] matmuls, and the axis of
# S in the keys, its second array of numbers: [B, K, S, H] on TPUs, [B, S, K, H] on GPUs.
ATTENTION = {
    "splash_mha_fwd": ("splash", 2, -2),
    "splash_mha_dq": ("splash", 3, -2),
    "splash_mha_dkv": ("splash", 4, -2),
    "flash_forward": ("flash", 2, 1),
    "flash_dq": ("flash", 3, 1),
    "flash_dkv": ("flash", 4, 1),
    "flash_decoding": ("flash decoding", 0, 1),
    "flash_prefill": ("flash prefill", 2, -2),
    r"__cudnn\$fmha\w*Backward": ("cudnn", 5, 1),
    r"__cudnn\$fmha": ("cudnn", 2, 1),
}
# Bits of types whose names do not state them, unlike bf16 and f8e4m3.
BITS = {"pred": 8, "token": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|\w+_computations?)=({[^}]*}|%?[\w.\-]+)")


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
    """The arrays of a shape, "(f32[8,128]{1,0}, s32[])", tuples flattened."""
    return [
        HloArray(kind, tuple(map(int, re.findall(r"\d+", sizes))), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]


@dataclass(eq=False)
class Instruction:
    """One line: %name = shape opcode(inputs), attributes.

    users: instructions that use the result, with the operand's index. called: computations by role.
    """

    name: str
    shape: str
    opcode: str
    inputs: str
    attributes: str
    inside: "Computation"
    operands: list["Instruction"] = field(default_factory=list)
    users: list[tuple["Instruction", int]] = field(default_factory=list)
    called: dict[str, list["Computation"]] = field(default_factory=dict)

    @cached_property
    def arrays(self) -> list[HloArray]:
        """Arrays of the result."""
        return arrays(self.shape)

    @property
    def elements(self) -> int:
        """The number of elements in the result."""
        return sum(array.elements for array in self.arrays)

    def attribute(self, pattern: str) -> str:
        """The pattern's first group in the attributes, or "" without a match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Origin in the JAX program: jit(step)/scope/while/body/dot_general."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """Target of a custom call; "" for other instructions."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def kernel(self) -> str:
        """Name of a custom call's kernel: its name in Pallas, or the target."""
        if self.target == "tpu_custom_call":
            return re.sub(r"[.\d]+$", "", self.name)
        return self.attribute(r'op_name="[^"]*?([^/"]+)/pallas_call"') or self.target


@dataclass(eq=False)
class Computation:
    """Instructions by name, in order of execution; the root is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None


def parse(text: str) -> list[Computation]:
    """Parses `compiled.as_text()`: callees precede their callers, and the entry is last."""
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            computation = computations[found[1]] = Computation(found[1])
        elif found := _INSTRUCTION.match(line):
            is_root, *parts = found.groups()
            one = Instruction(*parts, computation)
            names = re.findall(r"%([\w.\-]+)", one.inputs)
            one.operands = [computation.instructions[name] for name in names]
            for index, operand in enumerate(one.operands):
                operand.users.append((one, index))
            for role, called in _CALLED.findall(one.attributes):
                one.called[role] = [computations[n] for n in re.findall(r"[\w.\-]+", called)]
            computation.instructions[one.name] = one
            computation.root = one if is_root else computation.root
    return list(computations.values())


def runs(one: Instruction) -> bool:
    """Whether it is an operation (a kernel on GPUs) that runs on the device and computes."""
    if one.opcode == "custom-call":
        return KERNEL.match(one.target) is not None
    asynchronous = one.opcode.endswith(("-start", "-update", "-done", "send", "recv"))
    return not (asynchronous or one.opcode in FREE or one.opcode in COLLECTIVES)


def attention_kernel(names: Iterable[str]) -> str:
    """The attention kernel, by the names of a program's kernels; xla if none of them is one."""
    found = " ".join(names)
    return next((kind for mark, (kind, *_) in ATTENTION.items() if re.search(mark, found)), "xla")


def operation_flops(one: Instruction) -> float:
    """FLOPs of the matmuls in an operation, or of a known kernel; 0 for others.

    Causal attention kernels compute half of the scores.
    """
    if one.opcode == "fusion":
        (inner,) = one.called["calls"]
        return sum(map(operation_flops, inner.instructions.values()))
    if one.opcode == "custom-call":
        for mark, (_, products, axis) in ATTENTION.items():
            if re.search(mark, one.kernel):
                inputs = (array for operand in one.operands for array in operand.arrays)
                queries, keys, *_ = (array for array in inputs if "f" in array.kind)
                return float(products * queries.elements * keys.sizes[axis])
    if one.opcode != "dot" and not one.kernel.startswith("__cublas"):
        return 0.0
    # Two per element of the result and step of its sum.
    contracted = one.attribute(r'lhs_contracting_dim\w+"?[=:] ?[{[]([\d",]*)')
    sizes = one.operands[0].arrays[0].sizes
    steps = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", contracted))
    return 2.0 * one.arrays[0].elements * steps
