"""Shared memory that the GPU kernels need. It decides which cards can run them.

The figures are bytes of a block of threads. They are upper bounds of what Triton allocates in jax
0.10 and 0.12: scripts/proofs/gpu_kernels.py compiles the kernels. A kernel's loop loads the next
pair of blocks, such as keys and values, while it computes with the last one:

    Ampere, Ada, GeForce Blackwell    matmuls read registers: all pairs but one are in shared memory
    Hopper, data-center Blackwell     matmuls of 64 rows or more read shared memory: all pairs are
                                      there, and the other operands too
"""

from lsjax.kernels.flash_sizes import FLASH_BLOCK
from lsjax.platforms import shared_memory

# Slots or tokens of a block, and maximum number of new tokens in decoding.
BLOCK, MOST_STEPS = 64, 16
# Pairs of blocks in the pipeline: of decoding, best first, and of training.
DECODING_STAGES, TRAINING_STAGES = (3, 2), 2
WIDE_ROWS = 64  # fewest rows of a matmul that reads shared memory
PADDING = 8  # elements beside each row of weights, against bank conflicts
SUMS = 1024  # bytes of segments and of sums of queries


def decoding_stages(capability: float, rows: int, size: int, itemsize: int) -> int:
    """The most stages with which flash_decoding.py fits a card of this compute capability; 0 if it
    does not. rows: of queries, padded. size: of a head. itemsize: bytes of an element."""
    room = shared_memory(capability)
    needs = {n: decoding_bytes(capability, rows, size, itemsize, n) for n in DECODING_STAGES}
    return next((stages for stages, needed in needs.items() if needed <= room), 0)


def decoding_bytes(capability: float, rows: int, size: int, itemsize: int, stages: int) -> int:
    """For the queries, their weights of a block, and the pipeline's keys and values."""
    elements = rows * (size + BLOCK + PADDING) + (stages - 1) * 2 * BLOCK * size
    if rows >= WIDE_ROWS and _reads_shared_memory(capability):
        elements += 2 * BLOCK * size + 2 * MOST_STEPS * size
    return itemsize * elements


def training_bytes(capability: float, size: int, itemsize: int) -> int:
    """For the gradient of keys and values, which needs the most of flash.py's kernels: both of a
    program's own tokens, and the pipeline's queries and gradients."""
    elements = 2 * FLASH_BLOCK * size + (TRAINING_STAGES - 1) * 2 * BLOCK * size
    if _reads_shared_memory(capability):
        elements += 2 * BLOCK * size + 2 * FLASH_BLOCK * BLOCK
    return itemsize * elements + SUMS


def _reads_shared_memory(capability: float) -> bool:
    """Whether wide matmuls read shared memory; also assumed of unknown cards."""
    return int(capability) not in (8, 12)
