"""Drafts: the tokens that may be drafted, and the rules by which the whole model accepts them.

A rule is a plain function `rule(logits_BTV, draft) -> (tokens_BT, accepted_B)`, which
`SelfSpeculative(..., accept=rule)` uses instead of the two below. Column t is about the t-th new
token of a row: `draft.tokens_BT[:, t]` is the draft, and `logits_BTV[:, t]` are the whole model's
logits there, after the drafts before it and after penalties. The rule returns

    accepted_B   how many drafts of each row are accepted, from the first one on
    tokens_BT    these drafts, and one token more; the columns behind it are not read

This rule accepts a draft that is among the model's three most probable tokens:

    def accept_top_3(logits_BTV, draft):
        third_BT = jax.lax.top_k(logits_BTV, 3)[0][..., -1]
        accepted_B = draft.leading(draft.of_drafts(logits_BTV) >= third_BT)
        return draft.followed_by(logits_BTV.argmax(-1), accepted_B), accepted_B
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState
from lsjax.model.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftHead:
    """The head's rows of the N tokens that may be drafted. places_V: the number of a token among
    them, N if it is none of them."""

    ids_N: Int[Array, " N"]
    places_V: Int[Array, " V"]
    table_ND: Float[Array, "N D"]


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids that may be drafted, in rising order: of equal logits the lower id wins.

    The head costs as much as several layers, and a draft passes it for every token: N rows of it
    instead of V are quicker. The verification takes the whole head, so the text stays the same.
    """

    ids_N: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.ids_N)

    @classmethod
    def most_frequent(
        cls, counts: Mapping[int, int], size: int, vocab_size: int
    ) -> "DraftVocabulary":
        """The `size` tokens with the highest counts. Where fewer were seen, the lowest ids follow:
        tokenizers give low ids to what they merged first.

        Raises ConfigError for a size that is not in 1..vocab_size - 1.
        """
        _check_size(size, vocab_size)
        known = sorted({*range(size), *counts}, key=lambda token: (-counts.get(token, 0), token))
        return cls(np.sort(np.array(known[:size], np.int32)))

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError where the model has no such tokens, or no others."""
        _check_size(len(self), config.vocab_size)
        check(bool((np.diff(self.ids_N) > 0).all()), "the draft vocabulary's ids do not rise")
        check(
            bool(0 <= self.ids_N[0] and self.ids_N[-1] < config.vocab_size),
            f"the draft vocabulary has ids {self.ids_N[0]}..{self.ids_N[-1]}, the model "
            f"0..{config.vocab_size - 1}: count the tokens with the model's own tokenizer",
        )

    def head(self, model: Llama) -> DraftHead:
        """Its rows of the model's head."""
        ids_N = jnp.asarray(self.ids_N)
        places_V = jnp.full(model.config.vocab_size, len(self), jnp.int32)
        places_V = places_V.at[ids_N].set(jnp.arange(len(self)))
        return DraftHead(ids_N, places_V, model.head_table[ids_N])


def _check_size(size: int, vocab_size: int) -> None:
    check(size >= 1, f"a draft vocabulary of {size} is empty: choose --draft-vocab 1 or more")
    check(
        size < vocab_size,
        f"a draft vocabulary of {size} does not make the head of {vocab_size} smaller: choose a "
        "smaller --draft-vocab, or none",
    )


@dataclass(frozen=True)
class Draft:
    """What the first E layers leave for the verification.

    state: the rows before the round, with the draft's keys and values. hidden_BTD: exit hidden
    states of the pending token and the drafts. tokens_BT: the first count_B[b] columns are drafts
    of row b; the last column is a spare. log_q_BTN: what they were drawn from; None if greedy.
    head: of a draft vocabulary.
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

    def of_drafts(self, values_BTV: Float[Array, "B T V"]) -> Float[Array, "B T"]:
        """The value of each column's draft among its values."""
        return _of_tokens(values_BTV, self.tokens_BT)

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
    """Greedy: a draft is accepted if it is the whole model's argmax."""
    best_BT = argmax(logits_BTV)
    return best_BT, draft.leading(draft.tokens_BT == best_BT)


def accept_by_ratio(
    logits_BTV: Float[Array, "B T V"], draft: Draft
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Speculative sampling (Leviathan et al., 2023; Chen et al., 2023): the tokens have the whole
    model's distribution p, whatever the draft's distribution q is.

    Draft x is accepted with probability min(1, p(x) / q(x)). In the place of the first that is
    rejected, a token is drawn from max(0, p - q); behind a draft that is accepted whole, from p.
    """
    state, draws, head = draft.state, draft.state.draws, draft.head
    log_p_BTV = draws.log_probs(logits_BTV)
    index_BT = draft.tokens_BT if head is None else head.places_V[draft.tokens_BT]
    log_ratio_BT = draft.of_drafts(log_p_BTV) - _of_tokens(draft.log_q_BTN, index_BT)
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


def _of_tokens(
    values_BTN: Float[Array, "B T N"], index_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    return jnp.take_along_axis(values_BTN, index_BT[..., None], axis=2)[..., 0]
