"""What the traced program is compiled for, and what is tuned for it.

`platform` and `nvidia_capability` are facts. `tuned_for` is the platform too, unless the setting
`kernels` is "reference": then nothing is tuned. `tuning` says how programs differ, by TUNINGS.
Kernels ask for the platform themselves.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax

from lsjax.config import Kernels

# Compute capabilities for ahead-of-time compilation, where JAX knows only the device's name.
CAPABILITIES = {
    "NVIDIA A100": 8.0,
    "NVIDIA H100": 9.0,
    "NVIDIA H200": 9.0,
    "NVIDIA L4": 8.9,
    "NVIDIA GeForce RTX 4090": 8.9,
}
# KiB of shared memory for a block of threads, by compute capability (CUDA programming guide,
# "Technical Specifications per Compute Capability"). Unlisted cards get the least of these.
SHARED_KIB = {8.0: 163, 8.6: 99, 8.9: 99, 9.0: 227, 10.0: 227, 10.3: 227, 12.0: 99, 12.1: 99}
REFERENCE = "reference"


@dataclass(frozen=True)
class Tuning:
    """How programs for a platform differ from the plain ones, which are the defaults. Results
    differ by rounding at most. docs/performance.md has the measurements."""

    # Decoding
    # Fewest rows of a layer's matmuls, with zero steps appended: the matrix unit needs them.
    layer_rows: int = 0
    # Fewest rows at the left of the head's matmul and of attention's, for the same reason.
    left_rows: int = 0
    # Most rows whose logits are sums instead of a matmul, which reads the table more slowly.
    summed_rows: int = 0
    # Most rows of a batch that are written to the cache one by one. A scatter writes the others.
    unrolled_writes: int = 8
    # Attention reads a cache in blocks up to the longest row, instead of at once. A loop or branch
    # would stall an accelerator.
    reads_used_blocks: bool = False
    # Few tokens attend to the old cache and themselves, and are written later. Written first, they
    # would make XLA:TPU copy the cache.
    attends_before_writing: bool = False
    # The first program chooses the layouts of the weights.
    lays_out_weights: bool = False
    # Several positions take about as long as one, and launching a small operation about as long as
    # running it. So `auto` verifies with one width.
    positions_are_free: bool = False

    # Training
    # Attention kernels by preference, for rows with several documents and for others.
    packed_kernels: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    # qkv and gate_up are several matrices, and barriers keep SwiGLU apart from their matmuls.
    splits_matrices: bool = False
    # Rotary embeddings swap halves by a matmul: slices would leave half of 128 lanes empty.
    rotates_by_matmul: bool = False
    # SwiGLU's gradient is a stack instead of a `where`, for which XLA:GPU writes both halves first.
    # XLA:CPU runs a stack on one thread.
    stacks_gradients: bool = False
    # Parameters' gradients are computed before that of the layer's input. XLA would compute them
    # at the end of the layer, and keep their operands until then.
    parameters_first: bool = False
    # Remat keeps attention's output instead of its projection. They have the same size, but
    # attention takes longer to recompute.
    recomputes_projection: bool = False
    # The head is read after the layers have run. XLA would gather it, and allocate its gradient,
    # before them.
    delays_head: bool = False
    # The logits' gradient is computed once, and not again in each matmul that reads it.
    keeps_logit_gradients: bool = False
    # Most logits of a chunk of the loss, per device. Each chunk updates the whole gradient of the
    # table, so accelerators take more.
    chunk_logits: int = 2**25
    # Most elements of a chunk's states, which fast memory then holds; None for no limit.
    chunk_states: int | None = None


TUNINGS = {
    REFERENCE: Tuning(),
    "cpu": Tuning(summed_rows=4, reads_used_blocks=True, keeps_logit_gradients=True),
    "tpu": Tuning(
        layer_rows=8,
        left_rows=8,
        attends_before_writing=True,
        lays_out_weights=True,
        positions_are_free=True,
        packed_kernels=("splash",),
        kernels=("splash",),
        splits_matrices=True,
        rotates_by_matmul=True,
        keeps_logit_gradients=True,
        chunk_logits=2**28,
        chunk_states=2**24,
    ),
    "gpu": Tuning(
        layer_rows=16,
        unrolled_writes=1,
        lays_out_weights=True,
        positions_are_free=True,
        packed_kernels=("flash", "cudnn"),
        kernels=("cudnn",),
        stacks_gradients=True,
        parameters_first=True,
        recomputes_projection=True,
        delays_head=True,
        keeps_logit_gradients=True,
        chunk_logits=2**27,
    ),
}
# The setting of the programs that are traced in this thread. It is part of the key of JAX's caches,
# so a program that was traced under the other setting is never returned.
_kernels = jax.make_user_context("auto")


def platform() -> str:
    """Platform of the program that is being traced: "cpu", "gpu" or "tpu". The current mesh
    decides, whose devices may be abstract; without a mesh, this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def with_kernels(kernels: Kernels) -> AbstractContextManager:
    """Context in which programs are traced, gradients included. "reference": without tuned code."""
    return _kernels(kernels)


def tuned_for() -> str:
    """Platform that the traced program is tuned for, or "reference" for none."""
    return REFERENCE if _kernels.value == REFERENCE else platform()


def tuning() -> Tuning:
    """How the traced program is tuned."""
    return TUNINGS[tuned_for()]


def nvidia_capability() -> float:
    """Compute capability of the NVIDIA GPUs that the traced program targets; 0 for others."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    local = jax.local_devices()
    kind = local[0].device_kind if device is None else device.device_kind
    here = next((one for one in local if one.device_kind == kind), None)
    try:
        return float(here.compute_capability)
    except (AttributeError, ValueError):  # another kind of device, or not on this machine
        return capability_of(kind)


def capability_of(kind: str) -> float:
    """Compute capability of a card by JAX's name for it; 0 for unknown names."""
    return next((value for name, value in CAPABILITIES.items() if kind.startswith(name)), 0.0)


def shared_memory(capability: float) -> int | float:
    """Bytes of shared memory that a block of threads may use on a card. Capability 0 is no card:
    kernels are interpreted, without a limit."""
    kib = SHARED_KIB.get(capability, min(SHARED_KIB.values()))
    return 1024 * kib if capability else math.inf
