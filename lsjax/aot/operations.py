"""What one operation of a compiled program computes and moves.

FLOPs count for products and attention kernels. An operand counts in full, unless the operation
reads a slice of it; an update in place counts what it writes. On TPUs the fast memory of a core is
free: a copy ahead of time counts where it is used.
"""

import math
import re
from collections.abc import Iterable

from lsjax.aot.hlo import Computation, HloArray, HloModule, Instruction, arrays, shape_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
}
# Custom calls that run on the device; Pallas calls Triton's by two names.
KERNEL = re.compile(r"tpu_custom_call|__cu|cub|__gpu\$xla\.gpu\.triton|triton_kernel_call")
# Part of a kernel's name -> the attention that it belongs to.
ATTENTION = {
    "__cudnn$fmha": "cudnn",
    "splash_mha": "splash",
    "flash_forward": "flash",
    "flash_decoding": "flash decoding",
}
# Part of a kernel's name -> its products of [T, T] by [T, H] or alike, and the axis of T in its
# largest operand: splash's [B, N, T, H] on TPUs, flash's [B, T, N, H] on GPUs.
ATTENTION_PRODUCTS = {
    "splash_mha_fwd": (2, -2),
    "splash_mha_dq": (3, -2),
    "splash_mha_dkv": (4, -2),
    "flash_forward": (2, 1),
    "flash_dq": (3, 1),
    "flash_dkv": (4, 1),
}
CUDNN_FORWARD, CUDNN_BACKWARD = 2, 5
_SAME_ELEMENTS = ("bitcast", "convert", "copy", "reshape", "transpose")


def runs(one: Instruction) -> bool:
    """Whether it is an operation (a kernel, on GPUs) that runs on the device and computes."""
    if one.opcode == "custom-call":
        return KERNEL.match(one.target) is not None
    asynchronous = one.opcode.endswith(("-start", "-update", "-done"))
    return not (asynchronous or one.opcode in FREE or one.opcode in COLLECTIVES)


def attention_kernel(names: Iterable[str]) -> str:
    """The attention by the names of a program's kernels; xla for the compiler's own products."""
    found = " ".join(names)
    return next((kernel for mark, kernel in ATTENTION.items() if mark in found), "xla")


def operation_flops(module: HloModule, computation: Computation, one: Instruction) -> float:
    """FLOPs of the products in an operation, or of a known kernel; 0 for others."""
    match one.opcode:
        case "dot":
            return _product_flops(computation, one, r"lhs_contracting_dims={([\d,]*)}")
        case "fusion":
            (inner,) = (module.computations[name] for name in one.computations("calls"))
            return sum(operation_flops(module, inner, i) for i in inner.instructions.values())
        case "custom-call" if one.target.startswith("__cublas"):
            pattern = r'"lhs_contracting_dimensions": ?\[([\d",]*)\]'
            return _product_flops(computation, one, pattern)
        case "custom-call" if one.target.startswith("__cudnn$fmha"):
            return _cudnn_flops(computation, one)
        case "custom-call":
            return kernel_flops(one.kernel, largest_operand(computation, one))
    return 0.0


def kernel_flops(name: str, queries: HloArray | None) -> float:
    """FLOPs of an attention kernel, of whose scores causality leaves half; 0 for others."""
    known = (found for mark, found in ATTENTION_PRODUCTS.items() if mark in name)
    products, axis = next(known, (0, 0))
    return float(products * queries.elements * queries.sizes[axis]) if products else 0.0


def largest_operand(computation: Computation, one: Instruction) -> HloArray | None:
    """The array of most bytes among the operands."""
    operands = (computation.instructions.get(name) for name in one.operands)
    found = [array for operand in operands if operand for array in arrays(operand.shape)]
    return max(found, key=lambda array: array.bytes, default=None)


def _product_flops(computation: Computation, one: Instruction, contracted: str) -> float:
    """Two for each element of the result and each step of its sum."""
    left = computation.instructions.get(one.operands[0])
    if left is None:
        return 0.0
    sizes, axes = arrays(left.shape)[0].sizes, re.findall(r"\d+", one.attribute(contracted))
    return 2.0 * arrays(one.shape)[0].elements * math.prod(sizes[int(axis)] for axis in axes)


def _cudnn_flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of cuDNN's attention, which has the shape of the scores, [B, N, T, S], written out."""
    pattern = r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]'
    scores = [int(size) for size in re.findall(r"\d+", one.attribute(pattern))]
    queries = computation.instructions.get(one.operands[0])
    if not scores or queries is None:
        return 0.0
    products = CUDNN_BACKWARD if one.target.endswith("Backward") else CUDNN_FORWARD
    share = 0.5 if one.attribute(r'"mask_type": ?"(\w+)"') == "CAUSAL" else 1.0
    return products * 2.0 * math.prod(scores) * arrays(queries.shape)[0].sizes[-1] * share


def moved_bytes(module: HloModule, computation: Computation, one: Instruction) -> float:
    """Bytes that an operation reads from the device's memory and writes to it."""
    if not runs(one):
        return 0.0
    total = _written(module, computation, one)
    for index, name in enumerate(one.operands):
        operand = computation.instructions.get(name)
        if operand is not None and _from_memory(computation, operand):
            used = _used(module, computation, one, index, inside=False)
            share = used / max(1, _elements(operand.shape))
            total += shape_bytes(operand.shape) * min(1.0, share)
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
    module: HloModule,
    computation: Computation,
    user: Instruction,
    index: int,
    inside: bool = True,
    result: bool = True,
) -> float:
    """Elements of an operand that are read. inside: a fusion, where results of parts are not
    stored. result: an operand that the fusion returns counts as read."""
    own = _elements(computation.instructions[user.operands[index]].shape)
    match user.opcode:
        case "fusion":
            (name,) = user.computations("calls")
            called = module.computations[name]
            return _read(module, called, called.parameters[index])
        case "dynamic-slice" | "slice" | "gather" if index == 0:
            return _elements(user.shape)
        case "dynamic-update-slice" | "scatter" if index == 0:
            # In place: only what others read of the result is read.
            return _read(module, computation, user.name, result=False) if inside else 0.0
        case opcode if inside and opcode in _SAME_ELEMENTS:
            return _read(module, computation, user.name, result)
        case "tuple":
            return own if result else 0.0
    return own


def _read(module: HloModule, computation: Computation, name: str, result: bool = True) -> float:
    """Elements of a value in a fusion that are read."""
    own = _elements(computation.instructions[name].shape)
    total = float(own if result and name == computation.root.name else 0)
    for user, index in computation.users.get(name, ()):
        total += _used(module, computation, user, index, result=result)
    return min(own, total)


def _written(module: HloModule, computation: Computation, one: Instruction) -> float:
    """Bytes of the results; of an update in place, those that are new."""
    results, new = arrays(one.shape), _new_elements(module, computation, one)
    if len(new) != len(results):
        new = [array.elements for array in results]
    if one.opcode == "custom-call":
        # {{2}: (4, {}), {3}: (5, {})}: results 2 and 3 share the memory of operands 4 and 5.
        aliases = one.attribute(r"output_to_operand_aliasing=\{(.*?\}\))\}")
        for index in re.findall(r"\{(\d+)\}: \(", aliases):
            new[int(index)] = 0
    return sum(
        array.bytes * min(1.0, elements / max(1, array.elements))
        for array, elements in zip(results, new, strict=True)
        if array.in_memory
    )


def _new_elements(module: HloModule, computation: Computation, one: Instruction) -> list[int]:
    """Elements of each result that an operation writes."""
    if one.opcode == "fusion":
        (name,) = one.computations("calls")
        inner = module.computations[name]
        root = inner.root
        names = root.operands if root.opcode == "tuple" else (root.name,)
        sources = (_behind_views(inner, inner.instructions[name]) for name in names)
        return [new for source in sources for new in _new_elements(module, inner, source)]
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = one.operands[1 if one.opcode == "dynamic-update-slice" else -1]
        return [_elements(computation.instructions[update].shape)]
    return [array.elements for array in arrays(one.shape)]


def _behind_views(computation: Computation, found: Instruction) -> Instruction:
    """The operation behind casts and other views of its result."""
    source = computation.instructions.get(found.operands[0])
    if found.opcode not in _SAME_ELEMENTS or source is None or source.opcode == "parameter":
        return found
    return _behind_views(computation, source)
