"""Attention of a few new tokens to a cache as one kernel, for NVIDIA GPUs (Flash-Decoding, Dao et
al., 2023).

Rows of a batch, K/V heads and used cache blocks are split among programs. Each program returns the
attention to its own blocks, and their log-sum-exp as a weight for the sum. The first program also
sees the new tokens, and writes their keys and values to slots that no program reads.

R = G * T query rows of a K/V head, in P parts of the cache.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from lsjax.kernels.heads import heads_of_rows, rows_of_heads
from lsjax.kernels.online_softmax import LOWEST, add_block, first_sums
from lsjax.kernels.shared_memory import BLOCK, MOST_STEPS, decoding_stages
from lsjax.platforms import nvidia_capability, platform

# Minimum rows of a matmul; maximum rows that fit a program's registers.
FEWEST_ROWS, MOST_ROWS = 16, 64
# Programs that keep a GPU busy, and maximum parts of a row.
PROGRAMS, MOST_PARTS = 256, 16


def fits(q_BTNH: Float[Array, "B T N H"], keys: Float[Array, "B K S H"]) -> bool:
    """Whether the kernel supports these shapes, and fits the card that is compiled for. Triton
    requires powers of two."""
    (_, steps, heads, size), (_, kv_heads, capacity, _) = q_BTNH.shape, keys.shape
    rows = heads // kv_heads * steps
    few = steps <= MOST_STEPS and rows <= MOST_ROWS
    supported = few and size >= 16 and size & (size - 1) == 0 and capacity % BLOCK == 0
    return supported and _stages(rows, keys) > 0


def _padded(rows: int) -> int:
    """Rows of a program's matmuls."""
    return max(FEWEST_ROWS, pl.next_power_of_2(rows))


def _stages(rows: int, keys: Float[Array, "B K S H"]) -> int:
    """Stages of the pipeline; 0 if none fits."""
    itemsize = keys.dtype.itemsize
    return decoding_stages(nvidia_capability(), _padded(rows), keys.shape[3], itemsize)


def flash_decoding(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start_B: Int[Array, " B"],
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Causal attention of T tokens, from position `start_B` on, to the cache and to one another.
    Also returns the caches with their keys and values. Softmax in float32. window: keys that a
    query sees, its own included; by default all. Interpreted on CPUs. The caller checks `fits`."""
    batch, steps, heads, size = q_BTNH.shape
    kv_heads, capacity = keys.shape[1:3]
    rows = heads // kv_heads * steps
    padded = _padded(rows)
    parts = pl.next_power_of_2(pl.cdiv(PROGRAMS, batch * kv_heads))
    parts = min(parts, MOST_PARTS, pl.next_power_of_2(capacity // BLOCK))
    new_BKRH = _joined(padded, q_BTNH, k_BTKH.astype(keys.dtype), v_BTKH.astype(values.dtype))
    after = padded // MOST_STEPS

    def block(count, index):
        return pl.BlockSpec((None, None, count, size), lambda b, k, _: (b, k, index, 0))

    def part(*sizes):
        zeros = (0,) * len(sizes)
        return pl.BlockSpec((None, None, None, *sizes), lambda b, k, p: (p, b, k, *zeros))

    shape = (parts, batch, kv_heads, padded)
    mixed_PBKRH, weigh_PBKR, keys, values = pl.pallas_call(
        partial(_kernel, steps, parts, window),
        grid=(batch, kv_heads, parts),
        in_specs=(
            pl.BlockSpec((1,), lambda b, k, p: (b,)),
            *(block(padded, 0), block(MOST_STEPS, after), block(MOST_STEPS, after + 1)),
            *[block(capacity, 0)] * 2,
        ),
        out_specs=(part(padded, size), part(padded), block(capacity, 0), block(capacity, 0)),
        out_shape=(
            jax.ShapeDtypeStruct((*shape, size), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (keys, values)),
        ),
        input_output_aliases={4: 2, 5: 3},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_stages(rows, keys)),
        interpret=platform() == "cpu",
        name="flash_decoding",
    )(start_B, new_BKRH, new_BKRH, new_BKRH, keys, values)
    # Written out, the sums over parts need one kernel; as reductions they need three.
    top_BKR = reduce(jnp.maximum, weigh_PBKR)
    weights = [jnp.exp(weigh_BKR - top_BKR)[..., None] for weigh_BKR in weigh_PBKR]
    mixed_BKRH = sum(map(jnp.multiply, weights, mixed_PBKRH)) / sum(weights)
    mixed_BKRH = mixed_BKRH[:, :, :rows].astype(q_BTNH.dtype)
    return heads_of_rows(mixed_BKRH, q_BTNH.shape), keys, values


def _joined(padded, q_BTNH, k_BTKH, v_BTKH):
    """Queries, keys and values, padded to blocks. One array, so that one kernel makes it."""
    kv_heads = k_BTKH.shape[2]

    def rows_of(x, count):
        x_BKRH = rows_of_heads(x, kv_heads)
        return jnp.pad(x_BKRH, [(0, 0), (0, 0), (0, count - x_BKRH.shape[2]), (0, 0)])

    counts = padded, MOST_STEPS, MOST_STEPS
    return jnp.concatenate(list(map(rows_of, (q_BTNH, k_BTKH, v_BTKH), counts)), axis=2)


def _kernel(steps, parts, window, start_ref, q_ref, k_ref, v_ref, keys_ref, values_ref, *outputs):
    """A part of one K/V head's attention in one row of the batch."""
    mixed_ref, weigh_ref, new_keys_ref, new_values_ref = outputs
    part, start = pl.program_id(2), start_ref[0]
    q_RH, capacity = q_ref[...], keys_ref.shape[0]
    rows, size = q_RH.shape

    def look_at_block(index, carry):
        first = (part + index * parts) * BLOCK
        slots_S = first + jnp.arange(BLOCK)
        visible_RS = jnp.broadcast_to(slots_S[None] < start, (rows, BLOCK))
        if window is not None:
            visible_RS &= slots_S[None] > start + step_R1 - window
        slots = pl.ds(first, BLOCK)
        return add_block(q_RH, keys_ref[slots, :], values_ref[slots, :], visible_RS, carry)

    # Row r = (g, t) sees the new tokens up to its own.
    new_S, row_R = jnp.arange(MOST_STEPS), jnp.arange(rows)
    step_R1 = (row_R % steps)[:, None]
    visible_RS = (new_S[None] <= step_R1) & (part == 0)
    if window is not None:
        visible_RS &= new_S[None] > step_R1 - window
    carry = add_block(q_RH, k_ref[...], v_ref[...], visible_RS, first_sums(rows, size))
    in_use = pl.cdiv(jnp.minimum(start, capacity), BLOCK)
    begin = 0
    if window is not None:  # the part's first block with a slot that a query sees
        unseen = jnp.maximum(start - window + 1, 0) // BLOCK
        begin = pl.cdiv(jnp.maximum(unseen - part, 0), parts)
    carry = lax.fori_loop(begin, pl.cdiv(in_use - part, parts), look_at_block, carry)
    top_R1, total_R1, mixed_RH = carry
    seen_R1 = total_R1 > 0
    total_R1 = jnp.where(seen_R1, total_R1, 1)
    mixed_ref[...] = mixed_RH / total_R1
    weigh_ref[...] = jnp.where(seen_R1, top_R1 + jnp.log(total_R1), LOWEST).reshape(rows)

    @pl.when(part == 0)
    def _():
        for step in range(steps):
            # Ended rows may have no room left: their writes stay inside the cache.
            slot = pl.ds(jnp.minimum(start + step, capacity - 1), 1)
            new_keys_ref[slot, :] = k_ref[pl.ds(step, 1), :]
            new_values_ref[slot, :] = v_ref[pl.ds(step, 1), :]
