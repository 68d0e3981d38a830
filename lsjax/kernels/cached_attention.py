"""Attention to a cache: the choice of a form.

    flash_decoding    NVIDIA GPUs: one kernel writes few tokens and reads the slots in use
    flash_prefill     TPUs and NVIDIA GPUs: a kernel for prompts, after they are written
    before writing    TPUs: few tokens attend to the old cache and themselves
    blocks            CPUs, and prompts whose scores need much memory: slots in blocks
    reference         all slots at once

All agree up to rounding.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.kernels.cache_blocks import attend_to_blocks, attend_to_used_slots
from lsjax.kernels.cache_writes import write
from lsjax.kernels.heads import heads_of_rows, rows_of_heads
from lsjax.kernels.matmuls import enough_rows
from lsjax.kernels.shared_memory import MOST_STEPS
from lsjax.platforms import nvidia_capability, tuned_for, tuning

# Maximum scores of a head (queries times slots) that accelerators compute at once. Admits a chunk
# of 512 queries with 8,192 slots plus slack, but not with twice as many.
MOST_SCORES = 2**23
# Queries [B, T, N, H], keys and values [B, K, S, H], positions [B, T], window -> [B, T, N, H].
Reference = Callable[[Array, Array, Array, Array, int | None], Array]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | None,
    *,
    reference: Reference,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Writes T new keys and values at their positions, and attends to the slots at or before each
    query's own. Also returns the cache. window: number of slots that a query sees, its own
    included. Slots that were never written must not contain NaN or infinity."""
    start_B, steps, devices = positions_BT[:, 0], q_BTNH.shape[1], tuned_for()
    reads_prompts = False
    if devices == "tpu" or (devices == "gpu" and nvidia_capability() >= 8):
        from lsjax.kernels import flash_decoding, flash_prefill  # Pallas is slow to import

        if devices == "gpu" and flash_decoding.fits(q_BTNH, keys):
            arrays = q_BTNH, k_BTKH, v_BTKH, keys, values, start_B
            return flash_decoding.flash_decoding(*arrays, window)
        reads_prompts = steps > MOST_STEPS and flash_prefill.fits(q_BTNH, keys)
    k_BKTH = k_BTKH.swapaxes(1, 2).astype(keys.dtype)
    v_BKTH = v_BTKH.swapaxes(1, 2).astype(values.dtype)
    is_small = steps * keys.shape[2] <= MOST_SCORES
    if tuning().attends_before_writing and is_small and not reads_prompts:
        mixed = attend_before_writing(q_BTNH, k_BKTH, v_BKTH, keys, values, start_B, window)
        mixed, k_BKTH, v_BKTH = lax.optimization_barrier((mixed, k_BKTH, v_BKTH))
        return mixed, write(keys, k_BKTH, start_B, axis=2), write(values, v_BKTH, start_B, axis=2)
    keys = write(keys, k_BKTH, start_B, axis=2)
    values = write(values, v_BKTH, start_B, axis=2)
    if reads_prompts:
        mixed = flash_prefill.flash_prefill(q_BTNH, keys, values, start_B, window)
    elif tuning().reads_used_blocks:
        mixed = attend_to_used_slots(q_BTNH, keys, values, positions_BT, window)
    elif is_small:
        mixed = reference(q_BTNH, keys, values, positions_BT, window)
    else:
        mixed = attend_to_blocks(q_BTNH, keys, values, positions_BT, window)
    return mixed, keys, values


def attend_before_writing(
    q_BTNH: Float[Array, "B T N H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start_B: Int[Array, " B"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens to the slots before `start_B`, and causally to one another.

    One softmax covers both parts. So the result is that of the reference after the new keys and
    values are written, but the cache may be written later. For TPUs: XLA would copy a cache
    that it has just written to fast memory and back.
    """
    (_, steps, heads, size), kv_heads = q_BTNH.shape, keys.shape[1]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BKRH = rows_of_heads(q_BTNH, kv_heads)
    rows = q_BKRH.shape[2]
    if rows == 1:  # XLA:TPU multiplies two rows well, but not one
        q_BKRH = enough_rows(q_BKRH)
    start_B11, slots_S = start_B[:, None, None], jnp.arange(keys.shape[2])
    step_R1 = jnp.tile(jnp.arange(steps), heads // kv_heads)[:, None]  # of row r = (g, t)

    def scores(k, seen, back):
        """back: how many positions a key lies before a query."""
        seen = seen if window is None else seen & (back < window)
        scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k, preferred_element_type=wide)
        return jnp.where(seen[:, None], scores * size**-0.5, -jnp.inf)

    def mixed(weights, v):
        weights = weights.astype(v.dtype)
        return jnp.einsum("BKRS,BKSH->BKRH", weights, v, preferred_element_type=wide)

    old = scores(keys, slots_S < start_B11, start_B11 + step_R1 - slots_S)
    back_1RT = (step_R1 - jnp.arange(steps))[None]
    new = scores(k_BKTH, back_1RT >= 0, back_1RT)  # every query sees itself
    top = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    y_BKRH = ((mixed(old, values) + mixed(new, v_BKTH)) / total)[:, :, :rows]
    return heads_of_rows(y_BKRH.astype(q_BTNH.dtype), q_BTNH.shape)
