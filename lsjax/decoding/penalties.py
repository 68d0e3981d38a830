"""Penalties on repetition: logits that depend on the tokens before them.

They come before temperature and filters, in greedy decoding too. The logits of a draft see the
drafts before them, and so do those of the verification: every strategy gives the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.sampling import Sampling, as_array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What each row of a batch may not say again; see `Sampling` for the two numbers."""

    repetition_B: Float[Array, " B"]
    ngram_B: Int[Array, " B"]

    @classmethod
    def create(
        cls, rows: Sequence[Sampling], among: Sequence[Sampling] | None = None
    ) -> "Penalties | None":
        """Of row b as rows[b] says; None if nobody among them asks for any."""
        if not any(row.repeats for row in (rows if among is None else among)):
            return None
        return cls(
            repetition_B=as_array([row.repetition_penalty for row in rows], jnp.float32),
            ngram_B=as_array([row.no_repeat_ngram for row in rows], jnp.int32),
        )

    def apply(
        self,
        logits_BTN: Float[Array, "B T N"],
        history_BS: Int[Array, "B S"],
        position_BT: Int[Array, "B T"],
        places_V: Int[Array, " V"] | None = None,
    ) -> Float[Array, "B T N"]:
        """Logits for the tokens at these positions, each by the tokens of the history before it.

        places_V: where a token stands among the N that the logits are of, N if it does not. Where
        every token would be forbidden, none is.
        """
        batch, steps, size = logits_BTN.shape
        index_BS = history_BS if places_V is None else places_V[history_BS]
        slots = jnp.arange(history_BS.shape[1])
        before_BTS = slots < position_BT[..., None]
        index_BTS = jnp.where(before_BTS, index_BS[:, None], size)  # N is dropped below
        rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(steps)[:, None]
        said_BTS = logits_BTN.at[rows, columns, index_BTS].get(mode="fill", fill_value=0.0)
        penalty_B11 = self.repetition_B[:, None, None]
        lower_BTS = jnp.where(said_BTS > 0, said_BTS / penalty_B11, said_BTS * penalty_B11)
        lower_BTS = jnp.where(self._completes(history_BS, position_BT), -jnp.inf, lower_BTS)
        # A token that was said several times takes the lowest of its values.
        found_BTN = logits_BTN.at[rows, columns, index_BTS].min(lower_BTS, mode="drop")
        left_BT1 = jnp.isfinite(found_BTN.max(-1, keepdims=True))
        return jnp.where(left_BT1, found_BTN, logits_BTN)

    def _completes(
        self, history_BS: Int[Array, "B S"], position_BT: Int[Array, "B T"]
    ) -> Bool[Array, "B T S"]:
        """Whether the history's token s, said again at the position, would complete an n-gram that
        ends in slot s: whether the n - 1 tokens before both are the same."""
        slots = jnp.arange(history_BS.shape[1])
        ngram_B11 = self.ngram_B[:, None, None]

        def undecided(carry):  # however long the n-gram, few steps
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
