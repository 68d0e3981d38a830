"""Scaled dot-product attention with grouped queries: under a mask, and against a cache."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.model.products import enough_rows, mix
from lsjax.sharding import platform

# What splash and flash keep for their backward passes, for remat policies that save by name.
SAVED = "attention"
# Tokens of a block of flash, which divides its sequences.
OWN = 128
# Slots of the cache that one step of `cached_attention` reads; LARGE is a multiple of SMALL.
SMALL, LARGE = 256, 1024
# Scores of each head that accelerators hold at a time: 512 queries of 8,192 slots and a few more.
MOST_SCORES = 2**23
# The loops over these, by their names in compiled programs.
SMALL_BLOCKS, LARGE_BLOCKS = "small_cache_blocks", "large_cache_blocks"


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries to S keys where `mask_BTS` is true; softmax in float32 or wider."""
    batch, steps, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    # All queries of a K/V head in one product, r = (g, t), and heads before positions: XLA:CPU
    # copies what lies otherwise, and more of it in the backward pass.
    q_BKGTH = _grouped(q_BTNH, kv_heads).transpose(0, 2, 3, 1, 4) * size**-0.5
    q_BKRH = q_BKGTH.reshape(batch, kv_heads, -1, size)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    mask_B1RS = jnp.tile(mask_BTS[:, None], (1, 1, heads // kv_heads, 1))
    mixed = mix(q_BKRH, k_BKSH, v_BKSH, mask_B1RS)
    mixed = mixed.reshape(batch, kv_heads, -1, steps, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q_BTNH.shape)


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to the slots at or before their own positions.

    On accelerators it reads all slots, under a mask: a loop or a branch in each layer would stall
    the device. Chunks of a prompt in a large cache are read in blocks, as their scores would take
    too much memory. For few tokens NVIDIA GPUs have a kernel instead (flash_decoding.py).

    On CPUs it reads the cache in blocks up to the furthest query of the batch, with an online
    softmax (Milakov and Gimelshein, 2018), so that the cost follows the length in use: LARGE blocks
    as far as they are half full or more, then SMALL ones; all slots at once where these would be
    most of them (`reads_all`).

    What lies beyond a row's own length adds exact zeros to it. So rows do not see their batch
    mates, but for the rounding of the way that is taken. Unused slots must hold numbers, no NaN.
    """
    batch, steps, heads, size = q_BTNH.shape
    kv_heads, capacity = keys.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    rows = heads // kv_heads * steps
    q_BKRH = (
        _grouped(q_BTNH, kv_heads).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, size)
    )
    position_BR = jnp.tile(positions_BT, (1, heads // kv_heads))  # of row r = (g, t)
    last = positions_BT.max()

    def step(block, index, carry):
        top, total, mixed = carry
        # The last block starts earlier where the capacity is no multiple of the block, and skips
        # what the block before it has read.
        start = jnp.minimum(index * block, capacity - block)
        slots = start + jnp.arange(block)
        # Both blocks are copied before a product reads them. What makes the copy a computation
        # lets XLA:CPU share it among the threads (docs/performance.md).
        k_block = lax.dynamic_slice_in_dim(keys, start, block, axis=2) * size**-0.5
        v_block = lax.dynamic_slice_in_dim(values, start, block, axis=2)
        v_block = jnp.where((slots <= last)[:, None], v_block, 0)
        visible_BRS = (slots <= position_BR[:, :, None]) & (slots >= index * block)
        scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_block, preferred_element_type=wide)
        scores = jnp.where(visible_BRS[:, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        added = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v_block.dtype), v_block)
        return (
            new_top,
            total * shrink + weights.sum(-1),
            mixed * shrink[..., None] + added.astype(wide),
        )

    def in_blocks():
        # Slot 0 is visible to every query, so the first block makes `top` finite.
        carry = (
            jnp.full((batch, kv_heads, rows), -jnp.inf, wide),
            jnp.zeros((batch, kv_heads, rows), wide),
            jnp.zeros((batch, kv_heads, rows, size), wide),
        )
        # Loops even where one block is all, as there is a branch for all slots: without either
        # XLA:CPU copies the cache before it writes.
        small, done = min(SMALL, capacity), 0
        if capacity >= LARGE:
            full = (last + 1 + LARGE // 2) // LARGE
            with jax.named_scope(LARGE_BLOCKS):
                carry = lax.fori_loop(0, full, partial(step, LARGE), carry)
            done = full * (LARGE // SMALL)
        with jax.named_scope(SMALL_BLOCKS):
            carry = lax.fori_loop(done, last // small + 1, partial(step, small), carry)
        return carry[1:]

    def at_once():
        q = enough_rows(q_BKRH)
        scores = jnp.einsum("BKRH,BKSH->BKRS", q, keys, preferred_element_type=wide)[:, :, :rows]
        visible_BRS = jnp.arange(capacity) <= position_BR[:, :, None]
        scores = jnp.where(visible_BRS[:, None], scores * size**-0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1)
        if not on_cpu:  # one kernel less; XLA:CPU divides fewer numbers behind the product
            weights, total = weights / total[..., None], jnp.ones_like(total)
        mixed = jnp.einsum("BKRS,BKSH->BKRH", enough_rows(weights.astype(values.dtype)), values)
        return total, mixed[:, :, :rows].astype(wide)

    on_cpu = platform() == "cpu"
    if not on_cpu and steps * capacity <= MOST_SCORES:
        total, mixed = at_once()
    elif on_cpu:
        # The division is not in the branches: there XLA:CPU computes the weights twice.
        total, mixed = lax.cond(reads_all(last, capacity), at_once, in_blocks)
    else:
        total, mixed = in_blocks()
    mixed = (mixed / total[..., None]).astype(q_BTNH.dtype)
    mixed = mixed.reshape(batch, kv_heads, heads // kv_heads, steps, size)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def reads_all(last: Int[Array, ""], capacity: int) -> Bool[Array, ""]:
    """Whether all slots at once take no longer than the blocks up to the last one in use, which
    have to be copied: half of a small cache, nearly all of a large one (docs/performance.md)."""
    in_blocks = (last // SMALL + 1) * SMALL
    return in_blocks >= (capacity // 2 if capacity <= LARGE else capacity * 7 // 8)


def _grouped(q_BTNH: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B T K G H"]:
    """Queries beside the K/V head that they share (G = N / K of them each)."""
    batch, steps, heads, size = q_BTNH.shape
    return q_BTNH.reshape(batch, steps, kv_heads, heads // kv_heads, size)
