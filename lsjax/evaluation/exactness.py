"""Whether two greedy decodings agree, and a model on which every draft is accepted.

Self-speculation is lossless in exact arithmetic. In floating point the products of one token and
of d + 1 tokens round differently. So where the two best logits are all but equal, either may win.
A difference with a wider margin than rounding explains is a fault.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsjax.model.llama import Llama, unstacked

# The widest margin of the two best logits that rounding in float32 may turn over.
FLOAT32_MARGIN = 1e-4


@dataclass(frozen=True)
class Difference:
    """The first place where two decodings differ.

    index: of the new token. margin: by how much the whole model's best logit there exceeds the
    worse of the two tokens'; infinite if one decoding merely ends earlier. NaN stays NaN.
    roundings: the same in units of the largest logit's last place in the model's type: a few to
    some tens are what the sums of all layers leave.
    """

    index: int
    expected: int | None
    found: int | None
    margin: float
    roundings: float

    def to_json(self) -> dict[str, Any]:
        """Its fields; null for a number that is not finite."""
        row = asdict(self)
        return row | {k: None for k in ("margin", "roundings") if not math.isfinite(row[k])}


def first_difference(
    model: Llama, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int]
) -> Difference | None:
    """Where `found` leaves `expected`, both new tokens after `prompt`; None if they are equal."""
    if list(expected) == list(found):
        return None
    pairs = zip(expected, found, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if index is None:
        index = min(len(expected), len(found))
        ends = [tokens[index] if index < len(tokens) else None for tokens in (expected, found)]
        return Difference(index, *ends, margin=np.inf, roundings=np.inf)
    logits_V = last_logits(model, [*prompt, *expected[:index]])
    worse = np.minimum(logits_V[expected[index]], logits_V[found[index]])
    margin = float(logits_V.max() - worse)
    last_place = float(jnp.finfo(model.dtype).eps) * float(np.abs(logits_V).max())
    return Difference(index, expected[index], found[index], margin, margin / last_place)


def last_logits(model: Llama, tokens: Sequence[int]) -> Float[np.ndarray, " V"]:
    """Logits of the token that follows, by one pass over the whole text, without a cache."""
    padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)  # few shapes to compile
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits_at(model, padded, np.int32(len(tokens) - 1)))


@jax.jit
def _logits_at(
    model: Llama, tokens_BT: Int[Array, "1 T"], index: Int[Array, ""]
) -> Float[Array, " V"]:
    return model.unembed(jnp.take(model.exits(tokens_BT)[-1, 0], index, axis=0))


def identity_tail(model: Llama, exit_layer: int) -> Llama:
    """The same model with layers `exit_layer`.. that add nothing: the machinery without training.

    Their output projections (attention and feed-forward) are zero, arrays of their own. So the
    layers cost what they did, and every exit from `exit_layer` on says what the whole model says.
    """
    tail = jax.tree.map(lambda leaf: leaf, unstacked(model))
    for block in list(tail.layers)[exit_layer:]:
        for linear in (block.attention.out, block.feed_forward.down):
            linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
            if linear.bias is not None:
                linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))
    return tail
