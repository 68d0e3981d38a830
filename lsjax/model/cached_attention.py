"""Attention of new tokens to a cache, with grouped queries."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsjax.kernels.heads import heads_of_rows, rows_of_heads


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new queries to the slots at or before their own positions.

    window: number of slots that a query sees, its own included. Slots beyond a row's length
    contribute exactly zero, but must not contain NaN or infinity.
    """
    (_, _, heads, size), kv_heads = q_BTNH.shape, keys.shape[1]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BKRH = rows_of_heads(q_BTNH, kv_heads)
    position_BR1 = jnp.tile(positions_BT, (1, heads // kv_heads))[:, :, None]  # of row r = (g, t)
    slots_S = jnp.arange(keys.shape[2])
    visible_BRS = slots_S <= position_BR1
    if window is not None:
        visible_BRS &= slots_S > position_BR1 - window
    scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, keys, preferred_element_type=wide)
    scores = jnp.where(visible_BRS[:, None], scores * size**-0.5, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(values.dtype), values)
    return heads_of_rows(mixed.astype(q_BTNH.dtype), q_BTNH.shape)
