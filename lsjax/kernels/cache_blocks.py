"""Attention that reads the cache in blocks, with an online softmax (Milakov and Gimelshein, 2018).

On CPUs its cost follows the slots in use. Elsewhere it saves the memory of a long prompt's scores:
a loop or branch would stall an accelerator. Slots beyond a row's length contribute exactly zero.
Rows are independent, except that the batch's length selects the code path, which affects rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.kernels.heads import heads_of_rows, rows_of_heads

# Slots that one step reads; LARGE is a multiple of SMALL.
SMALL, LARGE = 256, 1024
# Names of the two loops in compiled programs.
SMALL_BLOCKS, LARGE_BLOCKS = "small_cache_blocks", "large_cache_blocks"

Totals = tuple[Float[Array, "B K R"], Float[Array, "B K R H"]]  # of weights, of weighted values


def attend_to_used_slots(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to the slots at or before their own positions, for CPUs. If most
    slots are in use, it reads all at once. window: slots that a query sees, its own included."""
    reader = CacheReader(q_BTNH, keys, values, positions_BT, window)
    # Reading all slots is no slower than copying the used blocks from half of a small cache on, or
    # nearly all of a large one (docs/performance.md).
    capacity = keys.shape[2]
    used = ((reader.last - reader.first) // SMALL + 1) * SMALL
    most = used >= (capacity // 2 if capacity <= LARGE else capacity * 7 // 8)
    # Divide outside the branches, or XLA:CPU computes the weights twice.
    return reader.output(*lax.cond(most, reader.at_once, reader.in_blocks))


def attend_to_blocks(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """The same, always in blocks."""
    reader = CacheReader(q_BTNH, keys, values, positions_BT, window)
    return reader.output(*reader.in_blocks())


class CacheReader:
    """Queries as rows r = (g, t) of each K/V head, and the slots that they see."""

    def __init__(self, q_BTNH, keys, values, positions_BT, window):
        kv_heads = keys.shape[1]
        self.shape, self.dtype = q_BTNH.shape, q_BTNH.dtype
        self.wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        self.keys, self.values, self.window = keys, values, window
        self.q_BKRH = rows_of_heads(q_BTNH, kv_heads)
        self.position_BR = jnp.tile(positions_BT, (1, q_BTNH.shape[2] // kv_heads))
        self.last = positions_BT.max()
        first = 0 if window is None else jnp.maximum(positions_BT.min() - window + 1, 0)
        self.first = first

    def visible(self, slots: Int[Array, " S"]) -> Bool[Array, "B R S"]:
        """Whether a row sees these slots."""
        position_BR1 = self.position_BR[:, :, None]
        seen_BRS = slots <= position_BR1
        return seen_BRS if self.window is None else seen_BRS & (slots > position_BR1 - self.window)

    def at_once(self) -> Totals:
        """Reads all slots."""
        keys, values, size = self.keys, self.values, self.shape[3]
        scores = jnp.einsum("BKRH,BKSH->BKRS", self.q_BKRH, keys, preferred_element_type=self.wide)
        visible_BRS = self.visible(jnp.arange(keys.shape[2]))
        scores = jnp.where(visible_BRS[:, None], scores * size**-0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        mixed = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(values.dtype), values)
        return weights.sum(-1), mixed.astype(self.wide)

    def in_blocks(self) -> Totals:
        """Reads blocks, large ones first, up to the longest row."""
        # `top` is finite from the start: with a window, a query may see no slot of a block.
        shape, capacity = self.q_BKRH.shape[:3], self.keys.shape[2]
        top = jnp.full(shape, jnp.finfo(self.wide).min, self.wide)
        carry = top, jnp.zeros(shape, self.wide), jnp.zeros(self.q_BKRH.shape, self.wide)
        # Keeps a loop even for one block. Without a loop or branch, XLA:CPU copies the whole cache
        # before writing.
        small, done = min(SMALL, capacity), 0
        if capacity >= LARGE:
            full = (self.last + 1 + LARGE // 2) // LARGE
            with jax.named_scope(LARGE_BLOCKS):
                step = partial(self._step, LARGE)
                carry = lax.fori_loop(self.first // LARGE, full, step, carry)
            done = full * (LARGE // SMALL)
        if self.window is not None:
            done = jnp.maximum(done, self.first // small)
        with jax.named_scope(SMALL_BLOCKS):
            step = partial(self._step, small)
            carry = lax.fori_loop(done, self.last // small + 1, step, carry)
        return carry[1:]

    def _step(self, block, index, carry):
        top, total, mixed = carry
        # If the block size does not divide the capacity, the last block starts earlier. It then
        # masks the slots that the previous block has read.
        start = jnp.minimum(index * block, self.keys.shape[2] - block)
        slots = start + jnp.arange(block)
        # XLA:CPU copies both blocks before the matmul. Fusing arithmetic into the copy (the scale
        # and the `where`) parallelises it across threads (docs/performance.md).
        scale = self.shape[3] ** -0.5
        k_block = lax.dynamic_slice_in_dim(self.keys, start, block, axis=2) * scale
        v_block = lax.dynamic_slice_in_dim(self.values, start, block, axis=2)
        v_block = jnp.where((slots <= self.last)[:, None], v_block, 0)
        visible_BRS = self.visible(slots) & (slots >= index * block)
        scores = jnp.einsum(
            "BKRH,BKSH->BKRS", self.q_BKRH, k_block, preferred_element_type=self.wide
        )
        scores = jnp.where(visible_BRS[:, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        added = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v_block.dtype), v_block)
        total = total * shrink + weights.sum(-1)
        return new_top, total, mixed * shrink[..., None] + added.astype(self.wide)

    def output(self, total, mixed) -> Float[Array, "B T N H"]:
        """Weighted means, as heads."""
        return heads_of_rows((mixed / total[..., None]).astype(self.dtype), self.shape)
