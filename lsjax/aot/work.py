"""FLOPs of products and attention kernels, for which a compiler gives no estimate of cycles."""

import math
import re

from lsjax.aot.hlo import Computation, Instruction, Program
from lsjax.aot.shapes import arrays

# Products of [T, T] by [T, H] or alike in attention kernels: splash on TPUs, others on GPUs.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
FLASH_PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkv": 4}
CUDNN_FORWARD, CUDNN_BACKWARD = 2, 5


def operation_flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of the products in an operation, or of a known kernel; 0 for others."""
    match instruction.opcode:
        case "dot":
            return _product(computation, instruction, r"lhs_contracting_dims={([\d,]*)}")
        case "fusion":
            called = (program.computations[name] for name in instruction.computations("calls"))
            return sum(
                operation_flops(program, inner, one)
                for inner in called
                for one in inner.instructions.values()
            )
        case "custom-call" if instruction.target.startswith("__cublas"):
            pattern = r'"lhs_contracting_dimensions": ?\[([\d",]*)\]'
            return _product(computation, instruction, pattern)
        case "custom-call" if instruction.target.startswith("__cudnn$fmha"):
            return _cudnn_attention(computation, instruction)
        case "custom-call" if instruction.target == "tpu_custom_call":
            return kernel_flops(instruction.name, largest_operand(computation, instruction))
        case "custom-call" if instruction.kernel in FLASH_PRODUCTS:
            batch, steps, heads, size = arrays(largest_operand(computation, instruction))[0].sizes
            scores = batch * heads * steps * steps / 2  # of rows with one document
            return FLASH_PRODUCTS[instruction.kernel] * 2.0 * scores * size
    return 0.0


def kernel_flops(name: str, shape: str) -> float:
    """FLOPs of a splash attention kernel on queries of this shape, [B, N, T, H], of which causality
    leaves half; 0 for others."""
    products = next((n for kind, n in SPLASH_PRODUCTS.items() if f"splash_mha_{kind}" in name), 0)
    sizes = [size for array in arrays(shape) for size in array.sizes]
    if not products or len(sizes) < 3:
        return 0.0
    *rows, steps, width = sizes
    return products * 2.0 * math.prod(rows) * steps * steps * width / 2


def largest_operand(computation: Computation, instruction: Instruction) -> str:
    """Its shape."""
    operands = (computation.instructions.get(name) for name in instruction.operands)
    found = [array for operand in operands if operand for array in arrays(operand.shape)]
    largest = max(found, key=lambda array: array.bytes, default=None)
    return "" if largest is None else f"{largest.kind}[{','.join(map(str, largest.sizes))}]"


def _product(computation: Computation, instruction: Instruction, contracted: str) -> float:
    """Two for each element of the result and each step of its sum."""
    left = computation.instructions.get(instruction.operands[0])
    numbers = re.findall(r"\d+", instruction.attribute(contracted) or "")
    if left is None:
        return 0.0
    sizes, result = arrays(left.shape)[0].sizes, arrays(instruction.shape)[0]
    return 2.0 * result.elements * math.prod(sizes[int(number)] for number in numbers)


def _cudnn_attention(computation: Computation, instruction: Instruction) -> float:
    """The scores' shape, [B, N, T, S], is in the configuration."""
    scores = instruction.attribute(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]')
    queries = computation.instructions.get(instruction.operands[0])
    if scores is None or queries is None:
        return 0.0
    backward = instruction.target.endswith("Backward")
    products = CUDNN_BACKWARD if backward else CUDNN_FORWARD
    causal = instruction.attribute(r'"mask_type": ?"(\w+)"') == "CAUSAL"
    size = math.prod(int(number) for number in re.findall(r"\d+", scores))
    return products * 2.0 * size * arrays(queries.shape)[0].sizes[-1] / (2 if causal else 1)
