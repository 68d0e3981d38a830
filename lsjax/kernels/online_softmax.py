"""Attention of a block of queries to the cache, a block of slots at a time: the step that the
kernels of decoding and of prompts share (Milakov and Gimelshein, 2018)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# Score of hidden slots: finite, so that differences are finite too.
LOWEST = float(jnp.finfo(jnp.float32).min)
# Over the slots so far: largest score, sum of weights, weighted sum of values. Float32.
Sums = tuple[Float[Array, "R 1"], Float[Array, "R 1"], Float[Array, "R H"]]


def columns_and_start(size: int) -> tuple[tuple[int, float], ...]:
    """Number of columns and first value of each of `Sums`, for heads of that size."""
    return (1, LOWEST), (1, 0.0), (size, 0.0)


def first_sums(rows: int, size: int) -> Sums:
    """The sums before the first block."""
    start = columns_and_start(size)
    top, total, mixed = (jnp.full((rows, n), value, jnp.float32) for n, value in start)
    return top, total, mixed


def add_block(
    q_RH: Float[Array, "R H"],
    k_SH: Float[Array, "S H"],
    v_SH: Float[Array, "S H"],
    seen_RS: Bool[Array, "R S"],
    sums: Sums,
) -> Sums:
    """The sums with a block of slots, of which a query may see none."""
    top, total, mixed = sums
    over_H = (((1,), (1,)), ((), ()))
    scores = lax.dot_general(q_RH, k_SH, over_H, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_RS, scores * q_RH.shape[1] ** -0.5, LOWEST)
    larger = jnp.maximum(top, scores.max(1, keepdims=True))
    shrink = jnp.exp(top - larger)
    weights = jnp.where(seen_RS, jnp.exp(scores - larger), 0)
    added = jnp.dot(weights.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
    total = total * shrink + weights.sum(1, keepdims=True)
    return larger, total, mixed * shrink + added
