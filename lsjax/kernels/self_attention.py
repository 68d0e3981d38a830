"""Attention within whole sequences: the choice of a kernel, and its limits.

    xla     the reference: matmuls and a softmax; materialises [T, T] weights
    splash  TPU kernel that comes with jax: skips blocks above the diagonal
    flash   GPU kernel of flash.py: skips fully masked blocks
    cudnn   cuDNN's flash attention, on NVIDIA GPUs since Ampere

All agree up to rounding. On a mesh, each device computes its own rows and heads. If the mesh shards
positions, it computes its own queries too, and gathers the keys and values of the whole row.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.config import AttentionKernel, check
from lsjax.kernels.flash_sizes import FLASH_BLOCK
from lsjax.kernels.shared_memory import training_bytes
from lsjax.platforms import REFERENCE, nvidia_capability, shared_memory, tuned_for, tuning
from lsjax.sharding import ROWS, context_shards, in_context_order, on_each_device

# Queries [B, T, N, H], keys and values [B, S, K, H], mask [#B, T, S] -> [B, T, N, H].
Reference = Callable[[Array, Array, Array, Array], Array]


def self_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"] | None = None,
    kernel: AttentionKernel = "auto",
    window: int | None = None,
    *,
    reference: Reference,
) -> Float[Array, "B T N H"]:
    """Causal attention of each token within its own segment; softmax in float32 or wider.

    segments_BT: document number of each token; one document by default. Segments are contiguous,
    and padding is one too. window: keys that a query sees, its own included. Columns are
    `in_context_order`. kernel: "auto" picks the first supported kernel. TPUs: splash. GPUs: flash
    if `segments_BT` is given, then cudnn. Otherwise xla. On CPUs splash and flash are interpreted.
    Raises ConfigError if the named kernel does not fit; `_problem` lists each kernel's limits.
    reference: attention under a mask, for xla.
    """
    if kernel == "auto":
        kernel = _first_supported(q_BTNH, packed=segments_BT is not None)
    problem = _problem(kernel, q_BTNH)
    check(problem is None, f"attention {kernel!r} {problem}: use auto or xla")
    shards, steps = context_shards(), q_BTNH.shape[1]
    # Places of each shard's queries in the row, or a kernel made for them.
    masks = in_context_order(np.arange(steps)[None]).reshape(shards, -1)
    if kernel == "splash":
        from lsjax.kernels.flash import shard_kernels  # slow to import

        masks = shard_kernels(masks, window)

    def own_queries(q, k, v, segments_BT, masks):
        keys = k, v, segments_BT
        if shards > 1:
            gather = partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
            keys = jax.tree.map(lambda x: in_context_order(gather(x), back=True), keys)
        masks = jax.tree.map(lambda leaf: leaf[0], masks)
        return _run(kernel, window, reference, masks, q, segments_BT, *keys)

    heads, row = P(ROWS, "context", "tensor"), P(ROWS, "context")
    arguments = q_BTNH, k_BTKH, v_BTKH, segments_BT, masks
    return on_each_device(own_queries, arguments, (heads, heads, heads, row, P("context")), heads)


def _first_supported(q_BTNH: Array, *, packed: bool) -> AttentionKernel:
    """The kernel of "auto". packed: whether rows have segments."""
    kernels = tuning().packed_kernels if packed else tuning().kernels
    return next((name for name in kernels if _problem(name, q_BTNH) is None), "xla")


def _problem(kernel: str, q_BTNH: Array) -> str | None:
    """Why the kernel can't be used; None if it can."""
    (_, steps, _, size), dtype, devices = q_BTNH.shape, q_BTNH.dtype, tuned_for()
    if devices == REFERENCE and kernel != "xla":
        return 'needs kernels "auto"'
    if kernel == "splash":
        if devices not in ("tpu", "cpu"):
            return f"is for TPUs, but this program is for {devices}"
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16, not {dtype}"
    if kernel in ("flash", "cudnn") and context_shards() > 1:
        return f"can't shard positions over mesh.context {context_shards()}"
    if kernel in ("flash", "cudnn") and not (kernel == "flash" and devices == "cpu"):
        if devices != "gpu" or nvidia_capability() < 8:
            return f"is for NVIDIA GPUs since Ampere, but this program is for {devices}"
        if dtype not in (jnp.float16, jnp.bfloat16):
            return f"takes float16 and bfloat16, not {dtype}"
    if kernel == "flash":
        if size < 16 or size & (size - 1):
            return f"takes head sizes of 16, 32, 64, ..., not {size}"
        capability = nvidia_capability()
        needed = training_bytes(capability, size, dtype.itemsize)
        if needed > shared_memory(capability):
            has = f"but the card has {shared_memory(capability):,}"
            return f"needs {needed:,} bytes of shared memory for head size {size}, {has}"
    if kernel == "flash" and steps % FLASH_BLOCK:
        return f"takes lengths that {FLASH_BLOCK} divides, not {steps}"
    if kernel == "cudnn" and (size > 128 or size % 8):
        return f"takes head sizes of 8, 16, ... 128, not {size}"
    if kernel == "cudnn" and steps % 2:
        return f"takes even lengths, not {steps}"
    return None


def _run(kernel, window, reference, positions_T, q_BTNH, segments_BT, k_BSKH, v_BSKH, segments_BS):
    """Runs a kernel on a device's queries. positions_T: theirs in the row, or splash's masks."""
    if kernel in ("splash", "flash"):
        from lsjax.kernels import flash  # slow to import
    if kernel == "splash":
        return flash.splash_attention(positions_T, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)
    if kernel == "flash":
        if segments_BT is None:
            segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
        return flash.flash_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, window)
    options = dict(is_causal=True, implementation="cudnn")  # skips blocks above the diagonal
    if kernel == "cudnn" and segments_BT is None:
        local = None if window is None else (window - 1, 0)  # skips the blocks before it too
        options |= dict(local_window_size=local)
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, **options)
    keys_S = jnp.arange(k_BSKH.shape[1])
    mask_BTS = (positions_T[:, None] >= keys_S)[None]
    if window is not None:
        mask_BTS &= positions_T[:, None] < keys_S + window
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == segments_BS[:, None]
    if kernel == "xla":
        return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], **options)
