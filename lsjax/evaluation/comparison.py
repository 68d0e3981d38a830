"""Compares two decodings of a prompt, and makes models whose drafts are all accepted.

Self-speculation is lossless in exact arithmetic. In floating point, matmuls of one token and of
d + 1 tokens round differently. If the two best logits are almost equal, either may win. A margin
wider than rounding explains is a bug.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsjax.model.llama import Llama, unstacked

# Widest margin between the two best logits that rounding in float32 may reverse.
FLOAT32_MARGIN = 1e-4


@dataclass(frozen=True)
class Difference:
    """First position where two decodings differ.

    index: index of the new token. margin: the full model's best logit there minus the lower logit
    of the two tokens; infinite if one decoding only ends earlier.
    """

    index: int
    expected: int | None
    found: int | None
    margin: float


def first_difference(
    model: Llama, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int]
) -> Difference | None:
    """First difference of `found` from `expected`, new tokens after `prompt`; None if equal."""
    if list(expected) == list(found):
        return None
    pairs = enumerate(zip_longest(expected, found))
    index, one, other = next((index, one, other) for index, (one, other) in pairs if one != other)
    if one is None or other is None:
        return Difference(index, one, other, math.inf)
    logits_V = last_logits(model, [*prompt, *expected[:index]])
    margin = float(logits_V.max() - np.minimum(logits_V[one], logits_V[other]))
    return Difference(index, one, other, margin)


def margin_of(difference: Mapping[str, Any]) -> float:
    """The margin of a difference in JSON; null means infinite."""
    return math.inf if difference["margin"] is None else difference["margin"]


def last_logits(model: Llama, tokens: Sequence[int]) -> Float[np.ndarray, " V"]:
    """Logits of the next token, from one pass over the complete text without a cache."""
    padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)  # few shapes to compile
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits_at(model, padded, np.int32(len(tokens) - 1)))


@jax.jit
def _logits_at(
    model: Llama, tokens_BT: Int[Array, "1 T"], index: Int[Array, ""]
) -> Float[Array, " V"]:
    return model.unembed(jnp.take(model.exits(tokens_BT)[-1, 0], index, axis=0))


def identity_tail(model: Llama, exit_layer: int) -> Llama:
    """The model, except that layers from `exit_layer` on add nothing: drafts of exits from there on
    are all accepted. The output projections are separate zero arrays, so the cost is unchanged."""
    tail = jax.tree.map(lambda leaf: leaf, unstacked(model))
    for block in list(tail.layers)[exit_layer:]:
        for linear in (block.attention.out, block.feed_forward.down):
            linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
            if linear.bias is not None:
                linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))
    return tail
