"""Drafts of a round, and how the next draft token is chosen."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.confidence import Confidence, Together
from lsjax.decoding.draft_vocabulary import DraftHead, DraftVocabulary
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState
from lsjax.model.protocol import Cache, DecoderModel, prepare


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftArguments:
    """What drafting takes at run time: the head of a draft vocabulary, and where drafts end."""

    head: DraftHead | None = None
    confidence: Confidence | Together | None = None

    @classmethod
    def create(
        cls, model: DecoderModel, vocabulary: DraftVocabulary | None, least: float | None
    ) -> "DraftArguments":
        """least: minimum product of top probabilities, or None."""
        head = None if vocabulary is None else vocabulary.head(model)
        return cls(head, None if least is None else Confidence(jnp.float32(least)))


class Places(NamedTuple):
    """Positions of the columns, and what the model prepared for them. The verification computes
    both before its branches: inside, XLA would compute them again in each layer."""

    positions_BT: Int[Array, "B T"]
    prepared: Any

    @classmethod
    def of(cls, model: DecoderModel, positions_BT: Int[Array, "B T"]) -> "Places":
        """The places of these positions."""
        return cls(positions_BT, prepare(model, positions_BT))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """One draft token of each row, and what it was chosen from."""

    token_B: Int[Array, " B"]
    log_q_B1W: Float[Array, "B 1 W"] | None  # its distribution, None if greedy
    top_B1: Float[Array, "B 1"] | None  # highest probability; None without a confidence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """Drafts of B rows, as input of the verification. Arrays have T = d + 1 columns.

    tokens_BT[:, t] is draft token t, and the last column is unused. Row b has count_B[b] draft
    tokens. hidden[:, t] belongs to the token before draft token t: the pending token for t = 0.
    """

    state: DecodeState  # the rows before the round, with the draft's keys and values
    # States that are kept, ascending by layer. Self-speculation: of exits below its own, then of
    # its own, which drafts. `auto`: the embedding, then each exit's.
    hidden: tuple[Float[Array, "B T D"], ...]
    tokens_BT: Int[Array, "B T"]
    count_B: Int[Array, " B"]
    log_q_BTW: Float[Array, "B T W"] | None  # the drafts' distributions, None if greedy
    head: DraftHead | None  # of a draft vocabulary
    top_BT: Float[Array, "B T"] | None = None  # highest probability, 0 where none was computed

    @classmethod
    def empty(
        cls,
        model: DecoderModel,
        state: DecodeState,
        arguments: DraftArguments,
        columns: int,
        kept: int = 1,
    ) -> "Draft":
        """No drafts, with room for `columns` - 1. kept: number of states for each column."""
        head, shape_BT = arguments.head, (len(state.length_B), columns)
        size = model.vocab_size if head is None else len(head.ids_W)
        none_BT = jnp.zeros(shape_BT, jnp.int32)
        x_BTD = jax.eval_shape(model.embed, none_BT, none_BT)
        return cls(
            state=state,
            hidden=(jnp.zeros(x_BTD.shape, x_BTD.dtype),) * kept,
            tokens_BT=none_BT,
            count_B=jnp.zeros_like(state.length_B),
            log_q_BTW=None if state.sampling is None else jnp.zeros((*shape_BT, size), jnp.float32),
            head=head,
            top_BT=None if arguments.confidence is None else jnp.zeros(shape_BT, jnp.float32),
        )

    @property
    def exists_BT(self) -> Bool[Array, "B T"]:
        """Columns that hold a draft."""
        return jnp.arange(self.tokens_BT.shape[1]) < self.count_B[:, None]

    @property
    def positions_BT(self) -> Int[Array, "B T"]:
        """Positions of the states."""
        return self.state.length_B[:, None] - 1 + jnp.arange(self.tokens_BT.shape[1])

    @property
    def inputs_BT(self) -> Int[Array, "B T"]:
        """The tokens of the states: the pending one and the drafts."""
        return jnp.concatenate([self.state.pending_B[:, None], self.tokens_BT[:, :-1]], axis=1)

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

    def with_cache(self, cache: Cache) -> "Draft":
        """The draft with an updated cache."""
        return replace(self, state=self.state.with_cache(cache))

    def first(self, columns: int) -> "Draft":
        """The first columns of the draft."""
        own = self.hidden, self.tokens_BT, self.log_q_BTW, self.top_BT
        hidden, tokens_BT, log_q_BTW, top_BT = jax.tree.map(lambda x: x[:, :columns], own)
        return replace(self, hidden=hidden, tokens_BT=tokens_BT, log_q_BTW=log_q_BTW, top_BT=top_BT)

    def with_states(self, at: Int[Array, ""], hidden: Any, cache: Cache) -> "Draft":
        """The draft with states of column `at`, [B, 1, D]."""
        hidden = jax.tree.map(partial(_put, at), self.hidden, hidden)
        return replace(self.with_cache(cache), hidden=hidden)

    def with_token(self, at: Int[Array, ""], chosen: Chosen) -> "Draft":
        """The draft with a token in column `at`. It does not count yet."""
        put = partial(_put, at)
        return replace(
            self,
            tokens_BT=put(self.tokens_BT, chosen.token_B[:, None]),
            log_q_BTW=None if self.log_q_BTW is None else put(self.log_q_BTW, chosen.log_q_B1W),
            top_BT=None if self.top_BT is None else put(self.top_BT, chosen.top_B1),
        )

    def choose_if(
        self,
        condition: Bool[Array, ""],
        model: DecoderModel,
        x_B1D: Float[Array, "B 1 D"],
        at: Int[Array, ""],
    ) -> Chosen:
        """The token of column `at`, from the exit's state before it. Zeros if the condition does
        not hold: that saves the head."""
        choose = partial(self._choose, model, at=at)
        like = jax.eval_shape(choose, x_B1D)

        def nothing(_):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

        return lax.cond(condition, choose, nothing, x_B1D)

    def _choose(self, model, x_B1D, at):
        state, head = self.state, self.head
        rows, places_V = (None, None) if head is None else (head.rows, head.places_V)
        logits_B1W = state.penalised(model.unembed(x_B1D, rows), at, self.tokens_BT, places_V)
        log_q_B1W = None
        if state.sampling is None:
            index_B = argmax(logits_B1W[:, 0])
        else:
            log_q_B1W = state.sampling.log_distribution(logits_B1W)
            q_BW = jnp.exp(log_q_B1W[:, 0])
            index_B = state.sampling.token(q_BW, state.length_B, Purpose.DRAFT, at)
        return Chosen(
            token_B=index_B if head is None else head.ids_W[index_B],
            log_q_B1W=log_q_B1W,
            # Not the sampled token's probability: that would bias the distribution.
            top_B1=None if self.top_BT is None else top_probability(logits_B1W),
        )


def _put(at, all_BT, one_B1):
    return lax.dynamic_update_slice_in_dim(all_BT, one_B1, at, axis=1)


def of_tokens(
    values_BTW: Float[Array, "B T W"], index_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The value of each token; NaN for an index beyond the last."""
    return jnp.take_along_axis(values_BTW, index_BT[..., None], axis=2)[..., 0]


def top_probability(logits: Float[Array, "... W"]) -> Float[Array, "..."]:
    """Highest probability of the distribution that the logits give."""
    return 1 / jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
