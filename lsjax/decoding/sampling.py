"""Sampling: penalties on the logits, the distribution that a token is drawn from, and the draws.

A distribution is a row of log-probabilities [V], -inf for a token that may not be drawn. A row of
temperature 0 is greedy: the argmax has probability 1. The filters find a threshold by bisection
instead of sorting the vocabulary.

A draw depends on the row's key and on the draw's purpose. The full model's own tokens also depend
on their position. Drafts and their tests depend on the position where their round starts, and on
their offset from there: so no draw of a rejected draft returns in the next round. A row's tokens do
not depend on its batch mates, except in `Adaptive`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from lsjax.config import GREEDY, Sampling
from lsjax.sharding import constrain

DRAW_BLOCK = 256  # tokens per block in the first search of a draw


class Purpose(IntEnum):
    """Purpose of a draw at a position; each purpose has its own random stream."""

    TOKEN = 0  # the full model's own token, or the replacement of a rejected draft
    DRAFT = 1
    ACCEPT = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """Sampling settings of each row, as arrays. filters: those that some row uses; the program
    omits the others."""

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    key_B2: UInt32[Array, "B 2"]
    filters: frozenset[str] = field(metadata=dict(static=True))

    @classmethod
    def create(
        cls, rows: Sequence[Sampling], all_rows: Sequence[Sampling] = ()
    ) -> "RowSampling | None":
        """Settings of these rows; None if all are greedy. all_rows: those of the program."""
        all_rows = all_rows or rows
        if all(row.temperature == 0 for row in all_rows):
            return None
        return cls(
            temperature_B=np.array([row.temperature for row in rows], np.float32),
            top_k_B=np.array([row.top_k for row in rows], np.int32),
            top_p_B=np.array([max(row.top_p, 1e-30) for row in rows], np.float32),  # not 0
            min_p_B=np.array([row.min_p for row in rows], np.float32),
            # As of jax.random.key, which takes 0.3 ms a row.
            key_B2=np.array([(0, row.seed) for row in rows], np.uint32),
            filters=frozenset(
                name
                for name in ("top_k", "top_p", "min_p")
                if any(getattr(row, name) != getattr(GREEDY, name) for row in all_rows)
            ),
        )

    def log_distribution(self, logits_BTV: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """The distributions that a token is drawn from, normalised."""
        # Gathered once, instead of an all-reduce in every step of a bisection.
        logits_BTV = constrain(logits_BTV, "data")
        greedy_B11 = (self.temperature_B == 0)[:, None, None]
        temperature_B11 = jnp.where(greedy_B11, 1, self.temperature_B[:, None, None])
        top_BT1 = logits_BTV.max(-1, keepdims=True)
        below_BTV = (top_BT1 - logits_BTV) / temperature_B11  # how far below the largest
        limit_BT1 = jnp.full_like(top_BT1, jnp.inf)  # tokens further below are excluded
        if "top_k" in self.filters:
            k_B11 = self.top_k_B[:, None, None]

            def enough(m):
                return (below_BTV <= m).sum(-1, keepdims=True) >= k_B11

            limit_BT1 = jnp.where(k_B11 == 0, jnp.inf, _smallest(enough, top_BT1))
        if "top_p" in self.filters:
            weight_BTV = jnp.where(below_BTV <= limit_BT1, jnp.exp(-below_BTV), 0)
            wanted_BT1 = self.top_p_B[:, None, None] * weight_BTV.sum(-1, keepdims=True)

            def enough(m):
                return jnp.where(below_BTV <= m, weight_BTV, 0).sum(-1, keepdims=True) >= wanted_BT1

            all_B11 = self.top_p_B[:, None, None] == 1
            found_BT1 = jnp.minimum(limit_BT1, _smallest(enough, top_BT1))
            limit_BT1 = jnp.where(all_B11, limit_BT1, found_BT1)
        if "min_p" in self.filters:
            limit_BT1 = jnp.minimum(limit_BT1, -jnp.log(self.min_p_B)[:, None, None])
        log_BTV = jax.nn.log_softmax(jnp.where(below_BTV <= limit_BT1, -below_BTV, -jnp.inf))
        is_best_BTV = jnp.arange(logits_BTV.shape[-1]) == argmax(logits_BTV)[..., None]
        return jnp.where(greedy_B11, jnp.where(is_best_BTV, 0, -jnp.inf), log_BTV)

    def token(
        self,
        weight_BV: Float[Array, "B V"],
        position_B: Int[Array, " B"],
        purpose: Purpose,
        offset: Int[Array, ""] | int = 0,
    ) -> Int[Array, " B"]:
        """Draws an index for each row; weights need not sum to 1. First draws a block of tokens by
        its sum, then a token of it, which spares a random number for each token."""
        batch, size = weight_BV.shape
        weight_Bnn = jnp.pad(weight_BV, ((0, 0), (0, -size % DRAW_BLOCK)))
        weight_Bnn = weight_Bnn.reshape(batch, -1, DRAW_BLOCK)
        keys_B = self._keys(position_B, offset, purpose)
        u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
        block_B = _first_beyond(weight_Bnn.sum(-1), u_B2[:, 0])
        inside_Bn = jnp.take_along_axis(weight_Bnn, block_B[:, None, None], axis=1)[:, 0]
        return block_B * DRAW_BLOCK + _first_beyond(inside_Bn, u_B2[:, 1])

    def uniform(
        self, position_B: Int[Array, " B"], offset_T: Int[Array, " T"], purpose: Purpose
    ) -> Float[Array, "B T"]:
        """A number in [0, 1) for each row and offset."""
        keys = jax.vmap(self._keys, in_axes=(None, 0, None), out_axes=1)
        return jax.vmap(jax.vmap(jax.random.uniform))(keys(position_B, offset_T, purpose))

    def _keys(
        self, position_B: Int[Array, " B"], offset: Int[Array, ""] | int, purpose: Purpose
    ) -> Array:
        """A key for each row's draw."""
        keys_B = jax.random.wrap_key_data(self.key_B2, impl="threefry2x32")
        stream = len(Purpose) * offset + purpose
        return jax.vmap(
            lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), stream)
        )(keys_B, position_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Penalties on repetition for each row of a batch; `Sampling` explains the two numbers.

    They apply given the earlier drafts, so all strategies produce the same greedy tokens.
    """

    repetition_B: Float[Array, " B"]
    ngram_B: Int[Array, " B"]

    @classmethod
    def create(
        cls, rows: Sequence[Sampling], all_rows: Sequence[Sampling] = ()
    ) -> "Penalties | None":
        """Penalties of these rows; None if no row of `all_rows` requests any."""
        if all(
            one.repetition_penalty == 1 and one.no_repeat_ngram == 0 for one in all_rows or rows
        ):
            return None
        return cls(
            repetition_B=np.array([row.repetition_penalty for row in rows], np.float32),
            ngram_B=np.array([row.no_repeat_ngram for row in rows], np.int32),
        )

    def apply(
        self,
        logits_BTW: Float[Array, "B T W"],
        history_BS: Int[Array, "B S"],
        position_BT: Int[Array, "B T"],
        places_V: Int[Array, " V"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Penalises the logits at these positions, each by the earlier tokens of the history.

        places_V: index of each token among the W with logits, or W if absent. If all tokens would
        be forbidden, penalties are skipped.
        """
        batch, steps, size = logits_BTW.shape
        index_BS = history_BS if places_V is None else places_V[history_BS]
        slots = jnp.arange(history_BS.shape[1])
        before_BTS = slots < position_BT[..., None]
        index_BTS = jnp.where(before_BTS, index_BS[:, None], size)  # W is dropped below
        rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(steps)[:, None]
        said_BTS = logits_BTW.at[rows, columns, index_BTS].get(mode="fill", fill_value=0.0)
        penalty_B11 = self.repetition_B[:, None, None]
        lower_BTS = jnp.where(said_BTS > 0, said_BTS / penalty_B11, said_BTS * penalty_B11)
        lower_BTS = jnp.where(self._completes(history_BS, position_BT), -jnp.inf, lower_BTS)
        # A token that occurs several times takes the lowest of its values.
        found_BTW = logits_BTW.at[rows, columns, index_BTS].min(lower_BTS, mode="drop")
        left_BT1 = jnp.isfinite(found_BTW.max(-1, keepdims=True))
        return jnp.where(left_BT1, found_BTW, logits_BTW)

    def _completes(
        self, history_BS: Int[Array, "B S"], position_BT: Int[Array, "B T"]
    ) -> Bool[Array, "B T S"]:
        """Whether the n - 1 tokens before slot s and before the position match."""
        slots = jnp.arange(history_BS.shape[1])
        ngram_B11 = self.ngram_B[:, None, None]

        def undecided(carry):  # few steps, however long the n-gram
            k, same_BTS = carry
            return (same_BTS & (k < ngram_B11)).any()

        def further(carry):
            k, same_BTS = carry
            before_BS = jnp.where(slots >= k, jnp.roll(history_BS, k, axis=1), -1)
            last_BT = jnp.take_along_axis(history_BS, jnp.maximum(position_BT - k, 0), axis=1)
            last_BT = jnp.where(position_BT >= k, last_BT, -2)
            equal_BTS = before_BS[:, None] == last_BT[..., None]
            return k + 1, same_BTS & (equal_BTS | (k >= ngram_B11))

        on_BTS = (ngram_B11 > 0) & (slots < position_BT[..., None])
        return lax.while_loop(undecided, further, (1, on_BTS))[1]


def argmax(logits: Float[Array, "*any V"]) -> Int[Array, "*any"]:
    """Index of the first largest logit; on CPUs faster than `jnp.argmax` (docs/performance.md)."""
    size = logits.shape[-1]
    is_top = logits == logits.max(-1, keepdims=True)
    index = jnp.where(is_top, jnp.arange(size, dtype=jnp.int32), size - 1)
    return index.min(-1)


def _first_beyond(weight_BW: Float[Array, "B W"], u_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """First index at which the running sum exceeds the share u of the total; never of weight 0."""
    sum_BW = jnp.cumsum(weight_BW, axis=-1)
    index = jnp.arange(weight_BW.shape[-1])
    some_BW = weight_BW > 0
    beyond_BW = some_BW & (sum_BW > u_B[:, None] * sum_BW[:, -1:])
    first_B = jnp.where(beyond_BW, index, index.size).min(-1)
    return jnp.minimum(first_B, jnp.where(some_BW, index, 0).max(-1)).astype(jnp.int32)


def _smallest(
    holds: Callable[[Float[Array, "B T 1"]], Bool[Array, "B T 1"]], like: Float[Array, "B T 1"]
) -> Float[Array, "B T 1"]:
    """The smallest number m >= 0 for which `holds(m)`, or infinity. `holds` must stay true above m.
    Bisects the bits, which have the same order as the numbers."""

    def step(_, bounds):
        low, high = bounds  # holds is false at low, true at high
        middle = low + (high - low) // 2
        true = holds(lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(true, low, middle), jnp.where(true, middle, high)

    low = jnp.full(like.shape, -1, jnp.int32)
    high = jnp.full(like.shape, 0x7F800000, jnp.int32)  # infinity
    return lax.bitcast_convert_type(lax.fori_loop(0, 31, step, (low, high))[1], jnp.float32)
