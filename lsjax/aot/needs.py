"""What one round of decoding has to read, however it is compiled: weights, and cache in use."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lsjax.aot.programs import Decoding
from lsjax.config import LlamaConfig
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed_shapes


@dataclass(frozen=True)
class Needs:
    """Bytes that each device reads in a round."""

    weights: int
    """Bytes of the layers and heads that the round passes, each as often as it does."""
    cache: int
    """Bytes of the slots in use, likewise."""
    layer_passes: int


def round_needs(config: LlamaConfig, asked: Decoding, mesh: Mesh, dtype: DTypeLike) -> Needs:
    """In autoregressive decoding a round is a token. In self-speculation the draft passes its
    layers once more than it has tokens, and the head once for each; the verification passes the
    other layers and the head once."""
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    model = placed_shapes(model, mesh)
    cache = jax.eval_shape(lambda: KVCache.create(config, asked.batch_size, 1, dtype, 1))
    cache = placed_shapes(cache, mesh)
    passes, heads = asked.passes(config)
    table = model.embedding if model.head is None else model.head
    weights = passes * _bytes(model.layers[0]) + heads * _bytes(table)
    return Needs(weights, passes * asked.prompt_tokens * _bytes(cache), passes)


def _bytes(tree) -> int:
    """Bytes of a device's share."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
