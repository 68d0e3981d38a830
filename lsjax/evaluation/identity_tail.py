"""A model whose every draft is right: for measuring the machinery apart from training."""

import jax
import jax.numpy as jnp
from flax import nnx

from lsjax.model.llama import Llama, unstacked


def identity_tail(model: Llama, exit_layer: int) -> Llama:
    """The same model with layers `exit_layer`.. that add nothing.

    Their output projections (attention and feed-forward) are zero, arrays of their own, so the
    layers cost what they did, and every exit from `exit_layer` on says what the whole model says.
    """
    tail = jax.tree.map(lambda leaf: leaf, unstacked(model))
    for block in list(tail.layers)[exit_layer:]:
        for linear in (block.attention.out, block.feed_forward.down):
            linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
            if linear.bias is not None:
                linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))
    return tail
