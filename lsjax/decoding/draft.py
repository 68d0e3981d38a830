"""Drafts: the tokens that may be drafted, and the rules by which the full model accepts them.

`SelfSpeculative(..., accept=rule)` uses a rule (docs/extending.md has an example). Column t belongs
to the t-th new token of a row. `draft.tokens_BT[:, t]` is the draft. `logits_BTV[:, t]` are the
full model's logits, given the earlier drafts and after penalties. `rule(logits_BTV, draft)` returns

    tokens_BT    the accepted drafts, and one more token; later columns are not read
    accepted_B   number of accepted drafts of each row, counted from the first
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState
from lsjax.model.llama import Llama


class DraftHead(NamedTuple):
    """The head's rows of the N tokens that may be drafted. places_V: index of each token among
    them, or N if it may not be drafted."""

    ids_N: Int[Array, " N"]
    places_V: Int[Array, " V"]
    table_ND: Float[Array, "N D"]


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids that may be drafted, in ascending order: of equal logits the lower id wins.

    The head costs as much as several layers, and N rows of it less than V. The verification uses
    the full head, so the text stays the same.
    """

    ids_N: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.ids_N)

    @classmethod
    def most_frequent(
        cls, counts: Mapping[int, int], size: int, vocab_size: int
    ) -> "DraftVocabulary":
        """The `size` tokens with the highest counts, then the lowest ids: tokenizers give these to
        their first merges. Raises ConfigError for a size that is not in 1..vocab_size - 1."""
        _check_size(size, vocab_size)
        known = sorted({*range(size), *counts}, key=lambda token: (-counts.get(token, 0), token))
        return cls(np.sort(np.array(known[:size], np.int32)))

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if the model lacks some of the tokens, or has no others."""
        _check_size(len(self), config.vocab_size)
        check(bool((np.diff(self.ids_N) > 0).all()), "draft vocabulary ids must ascend: sort them")
        check(
            bool(0 <= self.ids_N[0] and self.ids_N[-1] < config.vocab_size),
            f"the draft vocabulary has ids {self.ids_N[0]}..{self.ids_N[-1]}, the model "
            f"0..{config.vocab_size - 1}: count the tokens with the model's own tokenizer",
        )

    def head(self, model: Llama) -> DraftHead:
        """The rows of the model's head for these tokens."""
        ids_N, places_V = self.ids_N, np.full(model.config.vocab_size, len(self), np.int32)
        places_V[ids_N] = np.arange(len(self))
        return DraftHead(*jax.device_put((ids_N, places_V)), model.head_table[ids_N])


def _check_size(size: int, vocab_size: int) -> None:
    check(size >= 1, f"a draft vocabulary of {size} is empty: choose --draft-vocab 1 or more")
    check(
        size < vocab_size,
        f"a draft vocabulary of {size} does not make the head of {vocab_size} smaller: choose a "
        "smaller --draft-vocab, or none",
    )


@dataclass(frozen=True)
class Draft:
    """Output of the first E layers, as input of the verification.

    state: the rows before the round, with the draft's keys and values. hidden: for each exit of the
    program, hidden states [B, T, D] of the pending token and the drafts; those of exits after the
    drafting one are undefined. tokens_BT: the first count_B[b] columns are drafts of row b, the
    last column is unused. log_q_BTN: log-probabilities of the drafts' distributions, None if
    greedy. head: of a draft vocabulary. top_BT: highest probability of each draft, also of the one
    before which the confidence stopped; 0 where none was computed. None without a confidence.
    """

    state: DecodeState
    hidden: tuple[Float[Array, "B T D"], ...]
    tokens_BT: Int[Array, "B T"]
    count_B: Int[Array, " B"]
    log_q_BTN: Float[Array, "B T N"] | None
    head: DraftHead | None
    top_BT: Float[Array, "B T"] | None = None

    @property
    def exists_BT(self) -> Bool[Array, "B T"]:
        """Columns that hold a draft."""
        return jnp.arange(self.tokens_BT.shape[1]) < self.count_B[:, None]

    def of_drafts(self, values_BTV: Float[Array, "B T V"]) -> Float[Array, "B T"]:
        """The value of each column's draft token."""
        return of_tokens(values_BTV, self.tokens_BT)

    def leading(self, stands_BT: Bool[Array, "B T"]) -> Int[Array, " B"]:
        """Number of drafts of each row before the first whose `stands_BT` is false."""
        return jnp.cumprod(stands_BT & self.exists_BT, axis=1).sum(1)

    def followed_by(
        self, own_BT: Int[Array, "B T"], accepted_B: Int[Array, " B"]
    ) -> Int[Array, "B T"]:
        """The first `accepted_B` drafts, followed by the full model's own tokens."""
        is_draft_BT = jnp.arange(own_BT.shape[1]) < accepted_B[:, None]
        return jnp.where(is_draft_BT, self.tokens_BT, own_BT)

    def first(self, steps: int) -> "Draft":
        """The first columns of the draft."""
        columns = self.hidden, self.tokens_BT, self.log_q_BTN
        hidden, tokens_BT, log_q_BTN = jax.tree.map(lambda x: x[:, :steps], columns)
        return replace(self, hidden=hidden, tokens_BT=tokens_BT, log_q_BTN=log_q_BTN)


Accepted = tuple[Int[Array, "B T"], Int[Array, " B"]]
AcceptanceRule = Callable[[Float[Array, "B T V"], Draft], Accepted]


def accept_equal(logits_BTV: Float[Array, "B T V"], draft: Draft) -> Accepted:
    """Greedy: a draft is accepted if it is the full model's argmax."""
    best_BT = argmax(logits_BTV)
    return best_BT, draft.leading(draft.tokens_BT == best_BT)


def accept_block(logits_BTV: Float[Array, "B T V"], draft: Draft) -> Accepted:
    """Block verification (Sun et al., 2024): the tokens have the full model's distribution p,
    whatever the draft's distribution q. On average, tests of each draft in turn accept no more.

    Accepts the first t drafts, for the largest t whose random number is below `block_chances`. The
    next token comes from max(0, w_t p - q), normalised, with q = 0 after the last draft.

    A draft may end early, if its end depends on its own tokens only. Imagine that it goes on with
    q = p. There w is constant, and the excess is 0 until the end. So all imagined tokens are
    accepted, with chance w, or none. They are samples of p: the next rounds may draw them.
    """
    state, draws, head = draft.state, draft.state.draws, draft.head
    log_p_BTV = draws.log_probs(logits_BTV)
    weight_BT, chance_BT = block_chances(log_p_BTV, draft)
    index_T = jnp.arange(chance_BT.shape[1])
    # All tests count, so every round needs fresh numbers: they depend on where it starts.
    passes_BT = draws.uniform(state.length_B, index_T, Purpose.ACCEPT) < chance_BT
    accepted_B = jnp.where(passes_BT & (index_T <= draft.count_B[:, None]), index_T, 0).max(1)

    def here(values_BTX):
        return jnp.take_along_axis(values_BTX, accepted_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BN = jnp.exp(here(log_p_BTV)), jnp.exp(here(draft.log_q_BTN))
    q_BN = jnp.where((accepted_B < draft.count_B)[:, None], q_BN, 0)  # no draft: all of p
    rest_BV = here(weight_BT[..., None]) * p_BV
    rest_BV = rest_BV - q_BN if head is None else rest_BV.at[:, head.ids_N].add(-q_BN)
    rest_BV = jnp.maximum(rest_BV, 0)
    # If rounding leaves nothing, p and q are equal.
    rest_BV = jnp.where(rest_BV.sum(1, keepdims=True) > 0, rest_BV, p_BV)
    token_B = draws.token(rest_BV, state.length_B + accepted_B, Purpose.TOKEN)
    own_BT = jnp.broadcast_to(token_B[:, None], draft.tokens_BT.shape)
    return draft.followed_by(own_BT, accepted_B), accepted_B


def block_chances(
    log_p_BTV: Float[Array, "B T V"], draft: Draft
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Weights w_t of the first t drafts x, and the chances h_t that their test passes:

        w_0 = 1    w_t = min(1, w_{t-1} p(x_t) / q(x_t))
        h_t = e_t / (e_t + 1 - w_t)    with the excess e_t = sum of max(0, w_t p - q) over tokens

    Columns beyond the draft are undefined.
    """
    head = draft.head
    index_BT, log_p_BTN = draft.tokens_BT, log_p_BTV
    if head is not None:
        index_BT, log_p_BTN = head.places_V[index_BT], log_p_BTV[..., head.ids_N]
    log_ratio_BT = of_tokens(log_p_BTN, index_BT) - of_tokens(draft.log_q_BTN, index_BT)
    log_w_B = jnp.zeros_like(log_ratio_BT[:, 0])
    log_weights = [log_w_B]
    for t in range(log_ratio_BT.shape[1] - 1):
        log_w_B = jnp.minimum(0, log_w_B + log_ratio_BT[:, t])
        log_weights.append(log_w_B)
    log_w_BT = jnp.stack(log_weights, axis=1)
    # max(0, a - b) = a - min(a, b): tokens that may not be drafted need no pass.
    shared_BTN = jnp.minimum(log_w_BT[..., None] + log_p_BTN, draft.log_q_BTN)
    shared_BT = jnp.where(draft.exists_BT, jnp.exp(shared_BTN).sum(-1), 0)
    weight_BT = jnp.exp(log_w_BT)
    excess_BT = jnp.maximum(weight_BT - shared_BT, 0)
    # Without excess, p and q are equal or the weight is 0: longer drafts decide.
    total_BT = jnp.where(excess_BT > 0, excess_BT + (1 - weight_BT), 1)
    return weight_BT, excess_BT / total_BT


def of_tokens(
    values_BTN: Float[Array, "B T N"], index_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The value of each token; NaN for an index beyond the last."""
    return jnp.take_along_axis(values_BTN, index_BT[..., None], axis=2)[..., 0]
