"""Kernels of causal attention that skip masked blocks: flash on NVIDIA GPUs, splash on TPUs.

Flash (FlashAttention-2; Dao, 2023) attends within the documents of packed rows. Documents are
contiguous. So a block of queries visits the keys from the start of its first document to the
diagonal. Neither weights nor a mask of [T, T] are ever in memory.

    queries  keys
             a a a b b c c c      a, b, c: documents of a row
          a  x
          b  x x                  x: visited blocks
          b      x
          c      x x

Its kernels are written in Pallas and compiled by Triton. A program has a block of OWN tokens, and
visits the tokens that it needs in blocks of OTHERS. Weights are powers of 2, in float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from lsjax.kernels.flash_sizes import FLASH_BLOCK as OWN, SAVED
from lsjax.kernels.shared_memory import BLOCK as OTHERS, TRAINING_STAGES
from lsjax.platforms import platform

HIDDEN = -1e30  # score of hidden keys
# Arrays of a mask of splash, and block sizes: the first that pads the queries least is used.
SplashKernel = splash.splash_attention_kernel.SplashAttentionKernel
SPLASH_BLOCKS = (512, 384, 256, 128)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of each token to itself and the earlier tokens of its segment. window: keys that it
    sees, its own included. Segments are contiguous, T is a multiple of OWN, and H is a power of 2
    and at least 16. The card has `training_bytes` of shared memory."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)[0]


def _forward(q, k, v, segments, window):
    """Also returns residuals; logs [B, N, T]: base-2 logarithms of the softmax's denominators."""
    results = q, jax.ShapeDtypeStruct(q.swapaxes(1, 2).shape[:3], jnp.float32)
    found = _call(_flash_forward, window, segments, q, k, v, results=results)
    y, logs = checkpoint_name(found, SAVED)
    return y, (q, k, v, segments, y, logs)


def _backward(window, residuals, dy):
    q, k, v, segments, y, logs = residuals
    # The sum of weights times their gradients follows from the output, without a [T, T] pass.
    together = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    arrays = segments, q, k, v, dy, logs, together
    (dq,) = _call(_flash_dq, window, *arrays, results=(q,))
    dk, dv = _call(_flash_dkv, window, *arrays, results=(k, v))
    return dq, dk, dv, None


flash_attention.defvjp(_forward, _backward)


def _call(kernel, window, segments, q, k, v, *rest, results):
    """Calls the kernel with a program for each block of the first result: (i, n, b) handles block i
    of head n in row b. rest: arrays like q, then sums of queries."""
    batch, steps, heads, size = q.shape
    group = heads // k.shape[2]
    row = pl.BlockSpec((None, steps), lambda i, n, b: (b, 0))
    blocks = pl.BlockSpec((None, steps // OWN), lambda i, n, b: (b, 0))
    own = pl.BlockSpec((None, OWN, None, size), lambda i, n, b: (b, i, n, 0))
    own_sums = pl.BlockSpec((None, None, OWN), lambda i, n, b: (b, n, i))
    # A query head's keys and values.
    shared = pl.BlockSpec((None, steps, None, size), lambda i, n, b: (b, 0, n // group, 0))
    limits, queries, sums, keys = _first, own, own_sums, shared
    if kernel is _flash_dkv:  # a K/V head's queries
        limits, keys = _last, own
        queries = pl.BlockSpec((None, steps, group, size), lambda i, n, b: (b, 0, n, 0))
        sums = pl.BlockSpec((None, group, steps), lambda i, n, b: (b, n, 0))
    # With these numbers of warps the compiler for H100 spills no registers.
    warps = 4 if kernel is _flash_forward and size <= 64 else 8
    return pl.pallas_call(
        partial(kernel, scale=size**-0.5, window=window),
        grid=(steps // OWN, results[0].shape[2], batch),
        in_specs=(row, blocks, queries, keys, keys, *(queries, sums, sums)[: len(rest)]),
        out_specs=[own if x.ndim == 4 else own_sums for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=TRAINING_STAGES),
        interpret=platform() == "cpu",
        name=kernel.__name__.strip("_"),
    )(segments, limits(segments, window), q, k, v, *rest)


def _first(segments_BT, window=None):
    """[B, T / OWN]: the first key that each block's first token sees."""
    first = lax.argmax(segments_BT[:, ::OWN, None] == segments_BT[:, None], 2, jnp.int32)
    if window is None:
        return first
    return jnp.maximum(first, jnp.arange(first.shape[1], dtype=jnp.int32) * OWN - (window - 1))


def _last(segments_BT, window=None):
    """[B, T / OWN]: the last query that sees each block's last token."""
    return segments_BT.shape[1] - 1 - _first(segments_BT[:, ::-1], window)[:, ::-1]


def _flash_forward(segments_ref, first_ref, q_ref, k_ref, v_ref, y_ref, logs_ref, *, scale, window):
    """Accumulates over the keys so far, relative to the largest score so far."""
    block = pl.program_id(0)
    q, own = q_ref[...], _tokens(segments_ref, block, OWN, 1)

    def visit(other, carry):
        y, largest, total = carry
        keys = pl.ds(other * OTHERS, OTHERS)
        others = _tokens(segments_ref, other, OTHERS, 0)
        scores = _scores(q, k_ref[keys, :], own, others, scale, window)
        v, larger = v_ref[keys, :], jnp.maximum(largest, scores.max(1))
        # Keys before a query's document have weight 1. Its own scores are larger, and shrink these
        # weights to 0.
        weights, shrink = jnp.exp2(scores - larger[:, None]), jnp.exp2(largest - larger)
        y = y * shrink[:, None] + _product(weights.astype(v.dtype), v, 1, 0)
        return y, larger, total * shrink + weights.sum(1)

    y, total = jnp.zeros(q.shape, jnp.float32), jnp.zeros(OWN, jnp.float32)
    blocks = lax.div(first_ref[block], OTHERS), (block + 1) * (OWN // OTHERS)
    carry = y, jnp.full(OWN, HIDDEN, jnp.float32), total
    y, largest, total = lax.fori_loop(*blocks, visit, carry)
    y_ref[...] = (y / total[:, None]).astype(y_ref.dtype)
    logs_ref[...] = largest + jnp.log2(total)


def _flash_dq(segments_ref, first_ref, q_ref, k_ref, v_ref, *gradient_refs, scale, window):
    dy_ref, logs_ref, together_ref, dq_ref = gradient_refs
    block = pl.program_id(0)
    own, q, dy = _tokens(segments_ref, block, OWN, 1), q_ref[...], dy_ref[...]
    logs, together = logs_ref[...], together_ref[...]

    def visit(other, dq):
        keys = pl.ds(other * OTHERS, OTHERS)
        k, others = k_ref[keys, :], _tokens(segments_ref, other, OTHERS, 0)
        weights = jnp.exp2(_scores(q, k, own, others, scale, window) - logs[:, None])
        dscores = weights * (_product(dy, v_ref[keys, :], 1, 1) - together[:, None])
        return dq + _product(dscores.astype(k.dtype), k, 1, 0)

    blocks = lax.div(first_ref[block], OTHERS), (block + 1) * (OWN // OTHERS)
    dq = lax.fori_loop(*blocks, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _flash_dkv(segments_ref, last_ref, q_ref, k_ref, v_ref, *gradient_refs, scale, window):
    """Accumulates over the queries of all heads that share the keys."""
    dy_ref, logs_ref, together_ref, dk_ref, dv_ref = gradient_refs
    block = pl.program_id(0)
    own, k, v = _tokens(segments_ref, block, OWN, 1), k_ref[...], v_ref[...]

    def visit(head, other, carry):
        dk, dv = carry
        queries = pl.ds(other * OTHERS, OTHERS)
        q, dy = q_ref[queries, head, :], dy_ref[queries, head, :]
        others = _tokens(segments_ref, other, OTHERS, 0)
        # [keys, queries]: the layout of the matmuls below.
        scores = _scores(k, q, others, own, scale, window)
        weights = jnp.exp2(scores - logs_ref[head, queries])
        dscores = weights * (_product(v, dy, 1, 1) - together_ref[head, queries])
        dv += _product(weights.astype(dy.dtype), dy, 1, 0)
        return dk + _product(dscores.astype(q.dtype), q, 1, 0), dv

    def visit_head(head, carry):
        blocks = block * (OWN // OTHERS), lax.div(last_ref[block], OTHERS) + 1
        return lax.fori_loop(*blocks, partial(visit, head), carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], visit_head, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _tokens(segments_ref, block, size, axis):
    """Positions and segments of a block's tokens, as a column ([size, 1], axis 1) or a row."""
    places = block * size + jnp.arange(size, dtype=jnp.int32)
    segments = segments_ref[pl.ds(block * size, size)]
    return jnp.expand_dims(places, axis), jnp.expand_dims(segments, axis)


def _scores(x, y, queries, keys, scale, window):
    """Scores of x with y, one of them queries and one keys, for weights that are powers of 2."""
    (q_places, q_segments), (k_places, k_segments) = queries, keys
    seen = (q_places >= k_places) & (q_segments == k_segments)
    if window is not None:
        seen &= q_places < k_places + window
    return jnp.where(seen, _product(x, y, 1, 1) * (scale * math.log2(math.e)), HIDDEN)


def _product(x, y, axis, other):
    """Matmul in float32, over `axis` of x and `other` of y."""
    dimensions = (((axis,), (other,)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def shard_kernels(positions_PT: Int[np.ndarray, "P T"], window: int | None = None) -> SplashKernel:
    """One kernel of jax for C shards of queries, which attend to the keys of the whole row. Its
    arrays have a leading axis C. positions_PT: places of the queries in the row, known when the
    program is traced. window: keys that a query sees, its own included."""
    shards, steps = positions_PT.shape
    block = _block(steps)
    places = np.pad(positions_PT, ((0, 0), (0, -steps % block)), mode="edge").ravel()
    shape = len(places), -(-shards * steps // block) * block
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), offset=0)
    mask.q_sequence = places.astype(np.int32)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask]),
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name=SAVED,
        interpret=platform() == "cpu",
    )
    # Arrays over queries, or [1, blocks of queries, blocks of keys].
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, shards, axis=x.ndim // 2)), kernel)


def splash_attention(
    kernel: SplashKernel,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"] | None,
    segments_BS: Int[Array, "B S"] | None,
) -> Float[Array, "B T N H"]:
    """Attention of a shard's queries to the keys of the whole row. kernel: the shard's. Pads to
    full blocks; padded keys are at the end, where causal masking hides them."""
    steps, size = q_BTNH.shape[1], q_BTNH.shape[3]
    block = _block(steps)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))

    def one_row(q_TNH, k_SKH, v_SKH, segments):
        q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q_TNH * size**-0.5, k_SKH, v_SKH))
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segments).swapaxes(0, 1)

    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BS)
    arrays = jax.tree.map(padded, (q_BTNH, k_BSKH, v_BSKH, segments))
    return jax.vmap(one_row)(*arrays)[:, :steps]


def _block(steps: int) -> int:
    return min(SPLASH_BLOCKS, key=lambda block: -(-steps // block) * block)
