"""Which drafts stand: the two rules by which the whole model's logits judge a draft."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.draft_vocabulary import DraftHead
from lsjax.decoding.sampling import Purpose, likeliest
from lsjax.decoding.state import DecodeState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposals:
    """The drafts as indices among the N tokens that may be drafted, and the distributions that
    they were drawn from; None if they are the likeliest tokens."""

    index_BT: Int[Array, "B T"]
    log_q_BTN: Float[Array, "B T N"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """What the first E layers leave for the verification.

    state: with the draft's keys and values in the cache. hidden_BTD: the exit hidden states of
    the pending token and the drafts. tokens_BT: the drafts, of row b the first count_B[b]
    columns. T is one more than the longest draft that the program knows.
    """

    state: DecodeState
    hidden_BTD: Float[Array, "B T D"]
    tokens_BT: Int[Array, "B T"]
    count_B: Int[Array, " B"]
    proposals: Proposals

    @property
    def exists_BT(self) -> Bool[Array, "B T"]:
        """Columns that hold a draft."""
        return jnp.arange(self.tokens_BT.shape[1]) < self.count_B[:, None]


def accept_equal(
    logits_BTV: Float[Array, "B T V"], draft: Draft, head: DraftHead | None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Greedy: the longest prefix of the draft that is the whole model's likeliest token each time.

    Returns the whole model's tokens and the number of drafts that stand.
    """
    steps = logits_BTV.shape[1]
    best_BT = likeliest(logits_BTV)
    agrees_BT = (draft.tokens_BT[:, :steps] == best_BT) & draft.exists_BT[:, :steps]
    return best_BT, jnp.cumprod(agrees_BT, axis=1).sum(1)


def accept_by_ratio(
    logits_BTV: Float[Array, "B T V"], draft: Draft, head: DraftHead | None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Speculative sampling (Leviathan et al., 2023; Chen et al., 2023): the tokens have the whole
    model's distribution p, whatever the draft's distribution q is.

    Draft x stands with probability min(1, p(x) / q(x)). In the place of the first that does not, a
    token is drawn from max(0, p - q); behind a draft that stands whole, one from p.

    Returns the drafts that stand, the token drawn, and the number of the former.
    """
    steps = logits_BTV.shape[1]
    state, draws, proposals = draft.state, draft.state.draws, draft.proposals
    log_p_BTV = draws.log_probs(logits_BTV)
    drafts_BT, log_q_BTN = draft.tokens_BT[:, :steps], proposals.log_q_BTN[:, :steps]
    log_ratio_BT = (
        jnp.take_along_axis(log_p_BTV, drafts_BT[..., None], axis=2)
        - jnp.take_along_axis(log_q_BTN, proposals.index_BT[:, :steps, None], axis=2)
    )[..., 0]
    places_BT = state.length_B[:, None] + jnp.arange(steps)
    stands_BT = jnp.log(draws.uniform(places_BT, Purpose.ACCEPT)) < log_ratio_BT
    stands_BT &= draft.exists_BT[:, :steps]
    accepted_B = jnp.cumprod(stands_BT, axis=1).sum(1)

    def here(values_BTX):
        return jnp.take_along_axis(values_BTX, accepted_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BN = jnp.exp(here(log_p_BTV)), jnp.exp(here(log_q_BTN))
    q_BN = jnp.where((accepted_B < draft.count_B)[:, None], q_BN, 0)  # no draft: all of p
    rest_BV = p_BV - q_BN if head is None else p_BV.at[:, head.ids_N].add(-q_BN)
    rest_BV = jnp.maximum(rest_BV, 0)
    # Where rounding leaves nothing, p and q are equal.
    rest_BV = jnp.where(rest_BV.sum(1, keepdims=True) > 0, rest_BV, p_BV)
    token_B = draws.token(rest_BV, state.length_B + accepted_B, Purpose.TOKEN)
    is_draft_BT = jnp.arange(steps) < accepted_B[:, None]
    return jnp.where(is_draft_BT, drafts_BT, token_B[:, None]), accepted_B
