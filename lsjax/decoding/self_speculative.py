"""Self-speculative decoding (the paper's section 4.3): draft with the first layers, verify with
the rest, on one cache.

One round for one row, exit E = 2 of L = 4 layers, d = 3 drafts. The pending token is p:

    layers 2..3                        v v v v     verification: all four positions at once,
    layers 0..1   p   a   b   c        ^ ^ ^ ^     from the exit hidden states kept below
                  |   |   |   |        h h h h  <- (the paper's "KVQ" cache)
    draft head    a   b   c   -
    full head                          a b x y     the full model's tokens after p, a, b, c
                                       = = !
    committed     a   b   x                        two accepted drafts and one correction;
                                                   c is dropped: its slots get overwritten

Layers 0..E-1 never run twice on a token: the verification starts from the draft's exit hidden
states and reads the draft's keys and values. The last draft token passes the first layers
without a head, because nothing is drafted after it.

Exit and draft length are runtime arguments. With several exits, a `cond` guards the layers between
them. With several lengths, a `cond` guards each verification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.draft import (
    AcceptanceRule,
    Draft,
    DraftHead,
    DraftVocabulary,
    accept_by_ratio,
    accept_equal,
)
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState, Strategy, check_exit
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

DRAFT = "draft"  # the loop's name in compiled programs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoundSettings:
    """Arguments of a compiled round. confidence: minimum joint probability of the draft."""

    exit_layer: Int[Array, ""]
    num_draft_tokens: Int[Array, ""]
    head: DraftHead | None
    confidence: Float[Array, ""] | None


@dataclass(frozen=True)
class SelfSpeculative(Strategy):
    """Same greedy tokens as Autoregressive in fewer passes. Sampling keeps the distribution.

    exit_layer: E, layers of the draft. num_draft_tokens: d, drafts per round and row; 0 makes each
    round one autoregressive step. vocabulary: tokens that may be drafted, all by default.
    draft_confidence: stops drafting when the product of the exit's top-token probabilities falls
    below this value. accept: acceptance rule (draft.py); by default the lossless rule.
    shared_exits, shared_lengths: other exits and lengths that share the compiled program
    (`in_one_program`).
    """

    name = "self_speculative"
    exit_layer: int = field()
    num_draft_tokens: int = field()
    vocabulary: DraftVocabulary | None = None
    draft_confidence: float | None = None
    accept: AcceptanceRule | None = None
    shared_exits: tuple[int, ...] = ()
    shared_lengths: tuple[int, ...] = ()

    @property
    def draft_vocab(self) -> int | None:
        """Number of tokens that may be drafted; None for all."""
        return None if self.vocabulary is None else len(self.vocabulary)

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits that the program serves."""
        return tuple(sorted({self.exit_layer, *self.shared_exits}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Draft lengths that the program serves. If drafts may end early, quarters of d are
        included. Each round verifies with the shortest length that fits."""
        quarters = (4,) if self.draft_confidence is None else range(5)
        own = {self.num_draft_tokens * quarter // 4 for quarter in quarters}
        return tuple(sorted(own | {*self.shared_lengths}))

    @property
    def slack(self) -> int:
        """Cache slots per round: the pending token plus the longest draft."""
        return 1 + self.lengths[-1]

    @property
    def program(self) -> tuple:
        """Static settings that `step` reads. `arguments` carries the rest at run time."""
        ends_early = self.draft_confidence is not None
        return type(self), self.exits, self.lengths, self.draft_vocab, ends_early, self.accept

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if a number is out of range or the vocabulary does not match."""
        check(
            self.draft_confidence is None or 0 <= self.draft_confidence <= 1,
            f"draft_confidence {self.draft_confidence} is out of range: use a value from 0 to 1",
        )
        for exit_layer in self.exits:
            check_exit(exit_layer, config.num_layers - 1)  # the draft does not run all layers
        for drafts in self.lengths:
            check(
                0 <= drafts <= config.max_context,
                f"num_draft_tokens {drafts} is out of range: use 0..{config.max_context}",
            )
        if self.vocabulary is not None:
            self.vocabulary.validate(config)

    def arguments(self, model: Llama) -> RoundSettings:
        """Exit, length and confidence as numbers, and the rows of the head that the draft uses."""
        return RoundSettings(
            jnp.int32(self.exit_layer),
            jnp.int32(self.num_draft_tokens),
            None if self.vocabulary is None else self.vocabulary.head(model),
            None if self.draft_confidence is None else jnp.float32(self.draft_confidence),
        )

    def step(self, model: Llama, state: DecodeState, arguments: RoundSettings) -> DecodeState:
        """One round: draft, verify, and commit the accepted tokens plus one."""
        return self.verify(model, self.draft(model, state, arguments), arguments)

    def draft(self, model: Llama, state: DecodeState, settings: RoundSettings) -> Draft:
        """Up to d tokens per row from the exit.

        A row stops drafting at its length limit, at a stop token, or when confidence is too low.
        The limit leaves room for the token that the verification adds.
        """
        head, draws = settings.head, state.draws
        table_ND, places_V = (None, None) if head is None else (head.table_ND, head.places_V)
        shape_BT = (len(state.length_B), 1 + self.lengths[-1])
        limit_B = jnp.minimum(state.end_B - state.length_B - 1, settings.num_draft_tokens)

        def choose(x_BTD, i, tokens_BT, log_q_BTN, sure_B):
            """Chooses draft i of each row from the exit's logits, and updates the confidence."""
            logits_BTN = model.unembed(x_BTD, table_ND)
            logits_BTN = state.penalised(logits_BTN, i, tokens_BT, places_V)
            if settings.confidence is not None:
                # Use the argmax probability. Stopping on the sampled token's probability would bias
                # the output distribution.
                over_BTN = jnp.exp(logits_BTN - logits_BTN.max(-1, keepdims=True))
                sure_B = sure_B / over_BTN[:, 0].sum(-1)
            if draws is None:
                index_B = argmax(logits_BTN[:, 0])
            else:
                log_BTN = draws.log_probs(logits_BTN)
                index_B = draws.token(jnp.exp(log_BTN[:, 0]), state.length_B + i, Purpose.DRAFT)
                log_q_BTN = lax.dynamic_update_slice_in_dim(log_q_BTN, log_BTN, i, axis=1)
            token_B = index_B if head is None else head.ids_N[index_B]
            tokens_BT = lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], i, axis=1)
            return tokens_BT, log_q_BTN, sure_B

        def step(carry):
            """Runs the first layers on token i of each row, and drafts for the active rows."""
            active_B, i, cache, token_B, sure_B, drafts = carry
            hidden_BTD, tokens_BT, log_q_BTN, count_B = drafts
            x_BTD, cache = _run_segments(
                model,
                (0, *self.exits),
                lambda lo, hi: lo == 0 or settings.exit_layer >= hi,
                model.embed(token_B[:, None]),
                state.length_B[:, None] - 1 + i,
                cache,
            )
            hidden_BTD = lax.dynamic_update_slice_in_dim(hidden_BTD, x_BTD, i, axis=1)
            active_B &= i < limit_B
            # The last pass drafts nothing; its column is unused.
            tokens_BT, log_q_BTN, sure_B = lax.cond(
                active_B.any(),
                choose,
                lambda x_BTD, i, *drafts: drafts,
                *(x_BTD, i, tokens_BT, log_q_BTN, sure_B),
            )
            if settings.confidence is not None:
                active_B &= sure_B >= settings.confidence
            token_B, count_B = tokens_BT[:, i], count_B + active_B
            active_B &= ~state.is_stop(token_B)
            drafts = (hidden_BTD, tokens_BT, log_q_BTN, count_B)
            return active_B, i + 1, cache, token_B, sure_B, drafts

        size = self.draft_vocab or model.config.vocab_size
        none_yet = (
            jnp.zeros((*shape_BT, model.config.hidden_size), model.dtype),
            jnp.zeros(shape_BT, jnp.int32),
            None if draws is None else jnp.zeros((*shape_BT, size), jnp.float32),
            jnp.zeros_like(limit_B),
        )
        sure_B = jnp.ones_like(limit_B, jnp.float32)
        start = (state.running_B, 0, state.cache, state.pending_B, sure_B, none_yet)
        with jax.named_scope(DRAFT):
            _, _, cache, _, _, drafts = lax.while_loop(lambda carry: carry[0].any(), step, start)
        hidden_BTD, tokens_BT, log_q_BTN, count_B = drafts
        return Draft(state.with_cache(cache), hidden_BTD, tokens_BT, count_B, log_q_BTN, head)

    @jax.named_scope("verify")
    def verify(self, model: Llama, draft: Draft, settings: RoundSettings) -> DecodeState:
        """Runs the other layers on the pending token and the drafts in one pass. Commits the
        accepted drafts and one token of the full model."""
        state, longest, steps = draft.state, draft.count_B.max(), draft.tokens_BT.shape[1]
        rule = self.accept or (accept_equal if state.draws is None else accept_by_ratio)

        def judge(length: int, cache: KVCache, *_):
            """Verifies up to `length` drafts. Returns cache, accepted count, tokens and
            log-probabilities."""
            some = draft.first(1 + length)
            x_BTD, cache = _run_segments(
                model,
                (*self.exits, model.config.num_layers),
                lambda lo, hi: lo == self.exits[-1] or settings.exit_layer <= lo,
                some.hidden_BTD,
                state.length_B[:, None] - 1 + jnp.arange(1 + length),
                cache,
            )
            logits_BTV = model.unembed(x_BTD)
            new_BT, accepted_B = rule(state.penalised(logits_BTV, 0, draft.tokens_BT), some)
            found = new_BT, state.log_probs(logits_BTV, new_BT)
            wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, steps - x.shape[1]))), found)
            return cache, accepted_B, *wide

        empty_BT, log_probs_BT = jnp.zeros_like(draft.tokens_BT), None
        if state.log_probs_BS is not None:
            log_probs_BT = empty_BT.astype(jnp.float32)
        carry = (state.cache, jnp.zeros_like(draft.count_B), empty_BT, log_probs_BT)
        for shorter, length in pairwise((-1, *self.lengths)):
            fits = len(self.lengths) == 1 or (shorter < longest) & (longest <= length)
            carry = _run_if(fits, partial(judge, length), *carry)
        cache, accepted_B, new_BT, log_probs_BT = carry
        return state.with_cache(cache).commit(
            new_BT,
            accepted_B + 1,
            accepted_B=accepted_B,
            drafted_B=draft.count_B,
            draft_BT=draft.tokens_BT,
            log_probs_BT=log_probs_BT,
        )


def in_one_program(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The same strategies; all self-speculative ones share one compiled program."""
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    exits = tuple(sorted({one.exit_layer for one in drafting}))
    lengths = tuple(sorted({length for one in drafting for length in one.lengths}))
    return [
        replace(one, shared_exits=exits, shared_lengths=lengths) if one in drafting else one
        for one in strategies
    ]


def _run_segments(model, bounds, runs, x_BTD, positions_BT, cache):
    """Runs layers lo..hi-1 for each adjacent pair in `bounds`, if `runs(lo, hi)`."""
    for lo, hi in pairwise(bounds):
        x_BTD, cache = _run_if(
            runs(lo, hi),
            lambda x, cache, lo=lo, hi=hi: model.run_layers(x, lo, hi, positions_BT, cache),
            *(x_BTD, cache),
        )
    return x_BTD, cache


def _run_if(condition: Bool[Array, ""] | bool, run: Callable, *carry):
    """`run(*carry)` if the condition holds, else the carry. A static True needs no branch. Unlike
    `lax.switch` over whole programs, a small `cond` lets XLA update the cache in place."""
    if condition is True:
        return run(*carry)
    return lax.cond(condition, run, lambda *carry: carry, *carry)
