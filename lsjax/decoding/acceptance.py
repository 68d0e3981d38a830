"""Acceptance rules: which drafts stand, by the whole model's logits.

A rule is a plain function `rule(logits_BTV, draft) -> (tokens_BT, accepted_B)`, which
`SelfSpeculative(..., accept=rule)` uses instead of the two below. Column t is about the t-th new
token of a row: `draft.tokens_BT[:, t]` is the draft, and `logits_BTV[:, t]` is what the whole
model says there, after the drafts before it and after penalties. The rule returns

    accepted_B   how many drafts of each row stand, from the first one on
    tokens_BT    these drafts, and one token more; the columns behind it are not read

This rule accepts a draft that is among the model's three most probable tokens:

    def accept_top_3(logits_BTV, draft):
        third_BT = jax.lax.top_k(logits_BTV, 3)[0][..., -1]
        accepted_B = draft.leading(draft.of_drafts(logits_BTV) >= third_BT)
        return draft.followed_by(logits_BTV.argmax(-1), accepted_B), accepted_B
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.draft_vocabulary import DraftHead
from lsjax.decoding.sampling import Purpose, likeliest
from lsjax.decoding.state import DecodeState


@dataclass(frozen=True)
class Draft:
    """What the first E layers leave for the verification.

    state: the rows before the round, with the draft's keys and values in the cache; `state.draws`
    says how tokens are drawn, None for greedy decoding. hidden_BTD: exit hidden states of the
    pending token and of the drafts. tokens_BT: the drafts, of row b the first count_B[b] columns;
    there is a column more than the longest draft has. log_q_BTN: the distributions that they were
    drawn from; None in greedy decoding. head: of a draft vocabulary, whose tokens N numbers.
    """

    state: DecodeState
    hidden_BTD: Float[Array, "B T D"]
    tokens_BT: Int[Array, "B T"]
    count_B: Int[Array, " B"]
    log_q_BTN: Float[Array, "B T N"] | None
    head: DraftHead | None

    @property
    def exists_BT(self) -> Bool[Array, "B T"]:
        """Columns that hold a draft."""
        return jnp.arange(self.tokens_BT.shape[1]) < self.count_B[:, None]

    @property
    def index_BT(self) -> Int[Array, "B T"]:
        """The drafts, as numbers among the N tokens that may be drafted."""
        return self.tokens_BT if self.head is None else self.head.places_V[self.tokens_BT]

    def of_drafts(self, values_BTV: Float[Array, "B T V"]) -> Float[Array, "B T"]:
        """The value of each column's draft among its values."""
        return jnp.take_along_axis(values_BTV, self.tokens_BT[..., None], axis=2)[..., 0]

    def leading(self, stands_BT: Bool[Array, "B T"]) -> Int[Array, " B"]:
        """How many drafts of each row there are before the first that does not stand."""
        return jnp.cumprod(stands_BT & self.exists_BT, axis=1).sum(1)

    def followed_by(
        self, own_BT: Int[Array, "B T"], accepted_B: Int[Array, " B"]
    ) -> Int[Array, "B T"]:
        """The first `accepted_B` drafts, and the whole model's own tokens behind them."""
        is_draft_BT = jnp.arange(own_BT.shape[1]) < accepted_B[:, None]
        return jnp.where(is_draft_BT, self.tokens_BT, own_BT)

    def first(self, steps: int) -> "Draft":
        """Its first columns."""
        return replace(
            self,
            hidden_BTD=self.hidden_BTD[:, :steps],
            tokens_BT=self.tokens_BT[:, :steps],
            log_q_BTN=None if self.log_q_BTN is None else self.log_q_BTN[:, :steps],
        )


AcceptanceRule = Callable[
    [Float[Array, "B T V"], Draft], tuple[Int[Array, "B T"], Int[Array, " B"]]
]


def accept_equal(
    logits_BTV: Float[Array, "B T V"], draft: Draft
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Greedy: a draft stands if it is the whole model's argmax."""
    best_BT = likeliest(logits_BTV)
    return best_BT, draft.leading(draft.tokens_BT == best_BT)


def accept_by_ratio(
    logits_BTV: Float[Array, "B T V"], draft: Draft
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Speculative sampling (Leviathan et al., 2023; Chen et al., 2023): the tokens have the whole
    model's distribution p, whatever the draft's distribution q is.

    Draft x stands with probability min(1, p(x) / q(x)). In the place of the first that does not, a
    token is drawn from max(0, p - q); behind a draft that stands whole, one from p.
    """
    state, draws, head = draft.state, draft.state.draws, draft.head
    log_p_BTV = draws.log_probs(logits_BTV)
    log_q_BT = jnp.take_along_axis(draft.log_q_BTN, draft.index_BT[..., None], axis=2)[..., 0]
    log_ratio_BT = draft.of_drafts(log_p_BTV) - log_q_BT
    positions_BT = state.length_B[:, None] + jnp.arange(logits_BTV.shape[1])
    stands_BT = jnp.log(draws.uniform(positions_BT, Purpose.ACCEPT)) < log_ratio_BT
    accepted_B = draft.leading(stands_BT)

    def here(values_BTX):
        return jnp.take_along_axis(values_BTX, accepted_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BN = jnp.exp(here(log_p_BTV)), jnp.exp(here(draft.log_q_BTN))
    q_BN = jnp.where((accepted_B < draft.count_B)[:, None], q_BN, 0)  # no draft: all of p
    rest_BV = p_BV - q_BN if head is None else p_BV.at[:, head.ids_N].add(-q_BN)
    rest_BV = jnp.maximum(rest_BV, 0)
    # Where rounding leaves nothing, p and q are equal.
    rest_BV = jnp.where(rest_BV.sum(1, keepdims=True) > 0, rest_BV, p_BV)
    token_B = draws.token(rest_BV, state.length_B + accepted_B, Purpose.TOKEN)
    own_BT = jnp.broadcast_to(token_B[:, None], draft.tokens_BT.shape)
    return draft.followed_by(own_BT, accepted_B), accepted_B
