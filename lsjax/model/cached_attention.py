"""Attention of new tokens to a cache, with grouped queries (letters as in llama.py)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.model.attention import heads_of_rows, rows_of_heads
from lsjax.model.operations import enough_rows
from lsjax.platforms import tuning

# Slots of the cache that one step of `cached_attention` reads; LARGE is a multiple of SMALL.
SMALL, LARGE = 256, 1024
# Maximum scores of a head (queries times slots) that accelerators compute at once. Admits a chunk
# of 512 queries with 8,192 slots plus slack, but not with twice as many.
MOST_SCORES = 2**23
# Names of the two block loops in compiled programs.
SMALL_BLOCKS, LARGE_BLOCKS = "small_cache_blocks", "large_cache_blocks"


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to the slots at or before their own positions. window: number of
    slots that a query sees, its own included.

    On accelerators it reads all slots at once, because a loop or branch would stall the device.
    Only large prompt chunks are read in blocks, to save memory. Prompts have kernels, where they
    fit (flash_prefill.py), and so have few tokens on NVIDIA GPUs (flash_decoding.py).

    On CPUs it reads blocks with an online softmax (Milakov and Gimelshein, 2018), so cost follows
    the used length. If most slots are used, it reads all at once. Slots beyond a row's length
    contribute exactly zero. Rows are independent, except that batch length selects the code path,
    which affects rounding. Unused slots must not contain NaN or infinity.
    """
    batch, steps, heads, size = q_BTNH.shape
    kv_heads, capacity = keys.shape[1:3]
    by_blocks = tuning().reads_used_blocks
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    rows = heads // kv_heads * steps
    q_BKRH = rows_of_heads(q_BTNH, kv_heads)
    position_BR = jnp.tile(positions_BT, (1, heads // kv_heads))  # of row r = (g, t)
    last = positions_BT.max()
    first = 0 if window is None else jnp.maximum(positions_BT.min() - window + 1, 0)

    def visible(slots):
        seen_BRS = slots <= position_BR[:, :, None]
        return seen_BRS if window is None else seen_BRS & (slots > position_BR[:, :, None] - window)

    def step(block, index, carry):
        top, total, mixed = carry
        # If the block size does not divide the capacity, the last block starts earlier. It then
        # masks the slots that the previous block has read.
        start = jnp.minimum(index * block, capacity - block)
        slots = start + jnp.arange(block)
        # XLA:CPU copies both blocks before the matmul. Fusing arithmetic into the copy (the scale
        # and the `where`) parallelises it across threads (docs/performance.md).
        k_block = lax.dynamic_slice_in_dim(keys, start, block, axis=2) * size**-0.5
        v_block = lax.dynamic_slice_in_dim(values, start, block, axis=2)
        v_block = jnp.where((slots <= last)[:, None], v_block, 0)
        visible_BRS = visible(slots) & (slots >= index * block)
        scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_block, preferred_element_type=wide)
        scores = jnp.where(visible_BRS[:, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        added = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v_block.dtype), v_block)
        total = total * shrink + weights.sum(-1)
        return new_top, total, mixed * shrink[..., None] + added.astype(wide)

    def in_blocks():
        # `top` is finite from the start: with a window, a query may see no slot of a block.
        shape = batch, kv_heads, rows
        top = jnp.full(shape, jnp.finfo(wide).min, wide)
        carry = top, jnp.zeros(shape, wide), jnp.zeros((*shape, size), wide)
        # Keeps a loop even for one block. Without a loop or branch, XLA:CPU copies the whole cache
        # before writing.
        small, done = min(SMALL, capacity), 0
        if capacity >= LARGE:
            full = (last + 1 + LARGE // 2) // LARGE
            with jax.named_scope(LARGE_BLOCKS):
                carry = lax.fori_loop(first // LARGE, full, partial(step, LARGE), carry)
            done = full * (LARGE // SMALL)
        if window is not None:
            done = jnp.maximum(done, first // small)
        with jax.named_scope(SMALL_BLOCKS):
            carry = lax.fori_loop(done, last // small + 1, partial(step, small), carry)
        return carry[1:]

    def at_once():
        scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, keys, preferred_element_type=wide)
        visible_BRS = visible(jnp.arange(capacity))
        scores = jnp.where(visible_BRS[:, None], scores * size**-0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1)
        if not by_blocks:  # saves a kernel; CPUs divide after the matmul, which is cheaper
            weights, total = weights / total[..., None], jnp.ones_like(total)
        mixed = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(values.dtype), values)
        return total, mixed.astype(wide)

    if by_blocks:
        # Reading all slots is no slower than copying the used blocks from half of a small cache on,
        # or nearly all of a large one (docs/performance.md).
        used = ((last - first) // SMALL + 1) * SMALL
        most = used >= (capacity // 2 if capacity <= LARGE else capacity * 7 // 8)
        # Divide outside the branches, or XLA:CPU computes the weights twice.
        total, mixed = lax.cond(most, at_once, in_blocks)
    else:
        total, mixed = at_once() if steps * capacity <= MOST_SCORES else in_blocks()
    return heads_of_rows((mixed / total[..., None]).astype(q_BTNH.dtype), q_BTNH.shape)


def attention_before_writing(
    q_BTNH: Float[Array, "B T N H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start_B: Int[Array, " B"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens to the slots before `start_B`, and causally to one another.

    One softmax covers both parts. So the result is that of `cached_attention` after the new keys
    and values are written, but the cache may be written later. For TPUs: XLA would copy a cache
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
