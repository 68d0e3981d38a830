"""Attention of a chunk of a prompt to the cache as one kernel (FlashAttention-2; Dao, 2023).

The chunk's keys and values are in the cache already. A block of queries visits the blocks of slots
from the first that it sees to the chunk's last token. Scores are never in memory.

TPUs and NVIDIA GPUs have a kernel each. On TPUs the grid walks over the slots, and the sums stay in
the core's memory; the position of the chunk decides which block a step of the grid reads. On GPUs a
program has a loop over the slots.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jaxtyping import Array, Float, Int

from lsjax.kernels.heads import heads_of_rows, rows_of_heads
from lsjax.kernels.online_softmax import add_block, columns_and_start, first_sums
from lsjax.kernels.shared_memory import BLOCK, decoding_stages
from lsjax.platforms import nvidia_capability, platform, tuned_for

# On TPUs: slots of a block, most bytes of its queries, and the fewest rows, those of a tile.
TPU_SLOTS, TPU_BYTES, TPU_TILE = 512, 2**18, 16
GPU_ROWS = 128  # most rows of queries of a program


def fits(q_BTNH: Float[Array, "B T N H"], keys: Float[Array, "B K S H"]) -> bool:
    """Whether the platform has a kernel, and it supports these shapes."""
    (_, steps, heads, size), (_, kv_heads, capacity, _) = q_BTNH.shape, keys.shape
    if tuned_for() == "tpu":
        return _block(heads // kv_heads * steps, keys) % TPU_TILE == 0
    if tuned_for() != "gpu" or nvidia_capability() < 8 or keys.dtype.itemsize > 2:
        return False
    powers = all(number & (number - 1) == 0 for number in (steps, size))  # as Triton requires
    return powers and size >= 16 and capacity % BLOCK == 0 and _stages(steps, keys) > 0


def _block(rows: int, keys: Float[Array, "B K S H"]) -> int:
    """Rows of queries that a TPU's kernel holds at once."""
    row_bytes = pl.next_power_of_2(keys.shape[3] * keys.dtype.itemsize)
    return math.gcd(rows, TPU_BYTES // max(row_bytes, 256))


def _stages(steps: int, keys: Float[Array, "B K S H"]) -> int:
    """Stages of a GPU's pipeline; 0 if none fits. The memory is as in decoding with these rows."""
    rows, itemsize = min(steps, GPU_ROWS), keys.dtype.itemsize
    return decoding_stages(nvidia_capability(), rows, keys.shape[3], itemsize)


def flash_prefill(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start_B: Int[Array, " B"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of T tokens, from position `start_B` on, to the cache that holds them.
    Softmax in float32. window: keys that a query sees, its own included; by default all. Slots
    beyond the last token must not contain NaN or infinity. The caller checks `fits`."""
    run = _on_gpu if tuned_for() == "gpu" else _on_tpu
    return run(q_BTNH, keys, values, start_B.astype(jnp.int32), window)


def _seen(places_R1, slots_1S, window):
    seen_RS = slots_1S <= places_R1
    return seen_RS if window is None else seen_RS & (slots_1S > places_R1 - window)


def _first_block(start, window, block):
    """The first block with a slot that the token at `start` sees."""
    return 0 if window is None else jnp.maximum(start - window + 1, 0) // block


def _on_tpu(q_BTNH, keys, values, start_B, window):
    batch, steps, _, size = q_BTNH.shape
    kv_heads, capacity = keys.shape[1:3]
    q_BKRH = rows_of_heads(q_BTNH, kv_heads)
    rows = q_BKRH.shape[2]
    block = _block(rows, keys)

    def of_queries(b, k, r, s, start_B):
        return b, k, r, 0

    def of_slots(b, k, r, s, start_B):
        # Blocks behind the chunk are not read: the index stays at the last one.
        first = _first_block(start_B[b], window, TPU_SLOTS)
        return b, k, jnp.minimum(first + s, (start_B[b] + steps - 1) // TPU_SLOTS), 0

    queries = pl.BlockSpec((None, None, block, size), of_queries)
    slots = pl.BlockSpec((None, None, TPU_SLOTS, size), of_slots)
    sums = [tpu.VMEM((block, columns), jnp.float32) for columns, _ in columns_and_start(size)]
    mixed_BKRH = pl.pallas_call(
        partial(_tpu_kernel, steps, capacity, window),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, rows // block, pl.cdiv(capacity, TPU_SLOTS)),
            in_specs=[queries, slots, slots],
            out_specs=queries,
            scratch_shapes=sums,
        ),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=platform() == "cpu",
        name="flash_prefill",
    )(start_B, q_BKRH, keys, values)
    return heads_of_rows(mixed_BKRH, q_BTNH.shape)


def _tpu_kernel(steps, capacity, window, start_ref, q_ref, keys_ref, values_ref, mixed_ref, *sums):
    """A block of slots for a block of queries; row r = (g, t) of a K/V head."""
    start, step = start_ref[pl.program_id(0)], pl.program_id(3)
    block = _first_block(start, window, TPU_SLOTS) + step
    rows = q_ref.shape[0]
    first_row = pl.program_id(2) * rows

    @pl.when(step == 0)
    def _():
        for ref, (_, first) in zip(sums, columns_and_start(q_ref.shape[1]), strict=True):
            ref[...] = jnp.full(ref.shape, first, jnp.float32)

    @pl.when(block * TPU_SLOTS < start + steps)
    def _():
        row_R1 = first_row + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        slots_1S = block * TPU_SLOTS + lax.broadcasted_iota(jnp.int32, (1, TPU_SLOTS), 1)
        slots_S1 = block * TPU_SLOTS + lax.broadcasted_iota(jnp.int32, (TPU_SLOTS, 1), 0)
        # Behind the capacity, the last block holds anything, even NaN.
        v_SH = jnp.where(slots_S1 < capacity, values_ref[...], 0)
        seen_RS = _seen(start + lax.rem(row_R1, steps), slots_1S, window)
        before = tuple(ref[...] for ref in sums)
        found = add_block(q_ref[...], keys_ref[...], v_SH, seen_RS, before)
        for ref, new in zip(sums, found, strict=True):
            ref[...] = new

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        _, total, mixed = sums
        mixed_ref[...] = (mixed[...] / total[...]).astype(mixed_ref.dtype)


def _on_gpu(q_BTNH, keys, values, start_B, window):
    batch, steps, heads, size = q_BTNH.shape
    kv_heads, capacity = keys.shape[1:3]
    block = min(steps, GPU_ROWS)
    queries = pl.BlockSpec((None, block, None, size), lambda t, n, b: (b, t, n, 0))
    group = heads // kv_heads
    slots = pl.BlockSpec((None, None, capacity, size), lambda t, n, b: (b, n // group, 0, 0))
    return pl.pallas_call(
        partial(_gpu_kernel, window),
        grid=(steps // block, heads, batch),
        in_specs=[pl.BlockSpec((1,), lambda t, n, b: (b,)), queries, slots, slots],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        compiler_params=triton.CompilerParams(
            num_warps=8 if block * size > GPU_ROWS * 64 else 4, num_stages=_stages(steps, keys)
        ),
        interpret=platform() == "cpu",
        name="flash_prefill",
    )(start_B, q_BTNH, keys, values)


def _gpu_kernel(window, start_ref, q_ref, keys_ref, values_ref, mixed_ref):
    """A block of queries of one head."""
    q_RH = q_ref[...]
    rows, size = q_RH.shape
    start = start_ref[0] + pl.program_id(0) * rows
    places_R1 = start + jnp.arange(rows, dtype=jnp.int32)[:, None]

    def visit(block, sums):
        slots = pl.ds(block * BLOCK, BLOCK)
        slots_1S = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
        seen_RS = _seen(places_R1, slots_1S, window)
        return add_block(q_RH, keys_ref[slots, :], values_ref[slots, :], seen_RS, sums)

    begin, end = _first_block(start, window, BLOCK), pl.cdiv(start + rows, BLOCK)
    _, total, mixed = lax.fori_loop(begin, end, visit, first_sums(rows, size))
    mixed_ref[...] = (mixed / total).astype(mixed_ref.dtype)
