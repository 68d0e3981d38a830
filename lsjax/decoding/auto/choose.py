"""The choice of a round's source and draft length, by expected tokens and measured seconds."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsjax.decoding.auto.learned import (
    EASE_GREEDY,
    EASE_SAMPLED,
    expected_drafts,
    in_turn,
)
from lsjax.decoding.confidence import Together
from lsjax.decoding.sampling import argmax
from lsjax.decoding.state import DecodeState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What a round does. Exit 0 looks drafts up, or drafts nothing if their number is 0."""

    exit_layer: Int[Array, ""]
    num_draft_tokens: Int[Array, ""]
    confidence: Together | None  # of an exit; None if there are no exits

    @property
    def is_idle(self) -> Array:
        """Whether the round drafts nothing."""
        return (self.exit_layer == 0) & (self.num_draft_tokens == 0)


def choose(
    exits: tuple[int, ...],
    lengths: tuple[int, ...],
    num_layers: int,
    state: DecodeState,
    matched_B: Int[Array, " B"],
    seconds_QJ: Float[Array, "Q J"],
) -> Choice:
    """The source and length with the most expected tokens per second. An exit stops drafting where
    further tokens cost more time than they are worth: often before its first draft.

    matched_B: tokens that the lookup matched. seconds_QJ: of a round with each source (lookup, then
    the exits) and length.
    """
    learned, longest = state.learned, lengths[-1]
    ease = EASE_GREEDY if state.sampling is None else EASE_SAMPLED
    left_B = jnp.where(state.running_B, state.end_B - state.length_B, 0)
    rows = jnp.maximum(state.running_B.sum(), 1)
    # A batch takes as long as its slowest row: tokens count less for rows that are ahead.
    weight_B = rows * left_B**2.0 / jnp.maximum((left_B**2.0).sum(), 1)
    # Infinite seconds: not measured, or a choice that is ruled out. An exit drafts if it is sure
    # enough, or if its rounds without drafts were not measured. drafted: the chance that it does.
    idle_E1 = jnp.nan_to_num(seconds_QJ[1:, :1], posinf=0)
    wider_EJ = seconds_QJ[1:] - idle_E1
    least_EJ = jnp.where(idle_E1 > 0, wider_EJ / seconds_QJ[0, 0], 0)
    exit_EJ, drafted_EJ = learned.exit_tokens(lengths, least_EJ, ease, rows)
    seconds_EJ = jnp.nan_to_num(idle_E1 + drafted_EJ * wider_EJ, nan=jnp.inf, posinf=jnp.inf)
    lookup_BJ = learned.lookup_tokens(matched_B, lengths)
    exit_BEJ = jnp.broadcast_to(exit_EJ, (len(lookup_BJ), *exit_EJ.shape))
    tokens_BQJ = jnp.concatenate([lookup_BJ[:, None], exit_BEJ], axis=1)
    tokens_BQJ = jnp.minimum(tokens_BQJ, left_B[:, None, None])
    tokens_QJ = jnp.einsum("b,bqj->qj", weight_B, tokens_BQJ)
    rate_QJ = tokens_QJ / jnp.concatenate([seconds_QJ[:1], seconds_EJ])
    source, index = jnp.divmod(argmax(rate_QJ.reshape(-1)), len(lengths))
    exit_layer, length = jnp.array((0, *exits))[source], jnp.array(lengths)[index]
    if not exits:
        return Choice(exit_layer, length, None)
    own = jnp.maximum(source - 1, 0)
    seconds_T = seconds_of_drafts(
        lengths,
        seconds_QJ[source],
        (1 - exit_layer / num_layers) * seconds_QJ[0],
        expected_drafts(learned.mean_chance_E[own], lengths, ease),
    )
    # Before the first draft all rows are sure: so the exit's head runs at least once.
    least_T = jnp.minimum(rate_QJ.max() * seconds_T, rows)
    chances_ZT = in_turn(learned.chances_EZ[own], longest, ease)
    confidence = Together(least_T, chances_ZT, weight_B)
    # An exit may draft up to the longest length: the confidence stops it.
    return Choice(exit_layer, jnp.where(source > 0, longest, length), confidence)


def seconds_of_drafts(
    lengths: tuple[int, ...],
    round_J: Float[Array, " J"],
    verified_J: Float[Array, " J"],
    drafts_TJ: Float[Array, "T J"],
) -> Float[Array, " T"]:
    """Cost of each further draft token, in seconds per expected token. It costs the exit's layers.
    One that needs a wider verification also pays for that, with those that fit beside it.

    round_J: seconds of a round of each length. verified_J: of its verification. drafts_TJ: drafts
    that are expected to pass from draft t on, if it does.
    """
    step = round_J[-1] - round_J[1] - (verified_J[-1] - verified_J[1])
    step = step / max(1, lengths[-1] - lengths[1])
    step = jnp.where(jnp.isfinite(step), jnp.maximum(step, 0), 0)
    ahead_TJ = np.array(lengths) - np.arange(1 + lengths[-1])[:, None]
    fits_T = np.argmax(ahead_TJ >= 0, axis=1)  # index of the length that holds these drafts
    wider_TJ = round_J - round_J[fits_T, None]
    wider_TJ = jnp.nan_to_num(wider_TJ, nan=0, posinf=jnp.inf, neginf=0)
    further_TJ = wider_TJ / jnp.where(ahead_TJ > 0, drafts_TJ, 1)
    return jnp.maximum(jnp.where(ahead_TJ > 0, further_TJ, jnp.inf).min(-1), step)
