"""Scaled dot-product attention with grouped queries."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lsjax.kernels import self_attention as attention_kernels
from lsjax.kernels.heads import heads_of_rows, rows_of_heads


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries to S keys where `mask_BTS` is true; softmax in float32 or wider."""
    (_, _, heads, size), kv_heads = q_BTNH.shape, k_BSKH.shape[2]
    # All queries of a K/V head in one matmul, r = (g, t), and heads before positions. XLA:CPU
    # copies other layouts.
    q_BKRH = rows_of_heads(q_BTNH, kv_heads) * size**-0.5
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    mask_B1RS = jnp.tile(mask_BTS[:, None], (1, 1, heads // kv_heads, 1))
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(mask_B1RS, scores, -jnp.inf), axis=-1).astype(v_BKSH.dtype)
    return heads_of_rows(jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH), q_BTNH.shape)


# Within whole sequences, by a kernel or by the above.
self_attention = partial(attention_kernels.self_attention, reference=attention)
