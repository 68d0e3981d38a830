"""Self-speculative decoding (the paper's section 4.3): draft with the first layers, verify with
the rest, on one cache.

One round for one row, exit E = 2 of L = 4 layers, d = 3 drafts. The pending token is p:

    layers 2..3                        v v v v     verification: all four positions at once,
    layers 0..1   p   a   b   c        ^ ^ ^ ^     from the exit hidden states kept below
                  |   |   |   |        h h h h  <- (the paper's "KVQ" cache)
    draft head    a   b   c   -
    full head                          a b x y     what the whole model says after p, a, b, c
                                       = = !
    committed     a   b   x                        two accepted drafts and one correction;
                                                   c is dropped: its slots get overwritten

Layers 0..E-1 never run twice on a token: the verification starts from the draft's exit hidden
states and reads the draft's keys and values. The last draft token passes the first layers
without a head, because nothing is drafted after it; where a draft ends because its exit is unsure,
the head is what says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.acceptance import Draft, Proposals, accept_by_ratio, accept_equal
from lsjax.decoding.choices import Choices
from lsjax.decoding.draft_vocabulary import DraftHead, DraftVocabulary
from lsjax.decoding.sampling import Purpose, likeliest
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

DRAFT = "draft"  # the loop's name in compiled programs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """What a compiled round takes beside model and state: exit, draft length, the draft's head, and
    the probability below which a draft ends, if it may."""

    exit_layer: Int[Array, ""]
    num_draft_tokens: Int[Array, ""]
    head: DraftHead | None
    confidence: Float[Array, ""] | None


@dataclass(frozen=True)
class SelfSpeculative(Strategy):
    """Self-speculation: the tokens of Autoregressive in fewer passes of the model; sampled, tokens
    of the same distribution.

    exit_layer: E, layers of the draft. num_draft_tokens: d, drafts per round and row; 0 makes a
    plain step of a round. vocabulary: tokens that the draft may propose, all by default; the
    verification weighs all of them, so the result is the same. choices: exits and lengths to
    compile for, by default these two alone and, where drafts may end early, the quarters of d
    too. draft_confidence: a draft ends before the token with which it would be less probable than
    this, by the exit's probabilities of its likeliest tokens; by default it goes on to d.
    """

    name = "self_speculative"
    exit_layer: int = field()
    num_draft_tokens: int = field()
    vocabulary: DraftVocabulary | None = None
    choices: Choices | None = None
    draft_confidence: float | None = None

    @property
    def draft_vocab(self) -> int | None:
        """Tokens that the draft may propose, None for all."""
        return None if self.vocabulary is None else len(self.vocabulary)

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits that the program serves."""
        return self.choices.exit_layers if self.choices else (self.exit_layer,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Draft lengths that the program serves."""
        if self.choices:
            return self.choices.num_draft_tokens
        if self.draft_confidence is None:
            return (self.num_draft_tokens,)
        return tuple(sorted({self.num_draft_tokens * part // 4 for part in range(5)}))

    @property
    def slack(self) -> int:
        """A round writes the pending token and the longest draft."""
        return 1 + self.lengths[-1]

    @property
    def program(self) -> tuple:
        """All that `step` reads; the rest comes with `arguments`."""
        unsure = self.draft_confidence is not None
        return type(self), self.exits, self.lengths, self.draft_vocab, unsure

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError unless 1 <= exit_layer < L, num_draft_tokens >= 0, the choices
        cover both, the vocabulary is a part of the model's, and 0 <= draft_confidence <= 1."""
        check(
            self.draft_confidence is None or 0 <= self.draft_confidence <= 1,
            f"draft_confidence {self.draft_confidence} is not in 0..1: choose a --draft-confidence "
            "there",
        )
        for exit_layer in (self.exit_layer, *self.exits):
            check(
                1 <= exit_layer < config.num_layers,
                f"exit layer {exit_layer} is not in 1..{config.num_layers - 1}: the draft must "
                f"run some and not all of the {config.num_layers} layers; choose --exit-layer "
                "there",
            )
        for drafts in (self.num_draft_tokens, *self.lengths):
            check(
                drafts >= 0,
                f"num_draft_tokens {drafts} is below 0: choose --num-draft-tokens 1 or more, or "
                "0 to draft nothing",
            )
            check(
                drafts <= config.max_context,
                f"num_draft_tokens {drafts} is above the model's context of {config.max_context}: "
                "choose a smaller --num-draft-tokens",
            )
        check(
            self.exit_layer in self.exits and self.num_draft_tokens <= self.lengths[-1],
            f"exit layer {self.exit_layer} and {self.num_draft_tokens} drafts are not among the "
            f"choices {self.exits} and {self.lengths}",
        )
        if self.vocabulary is not None:
            self.vocabulary.validate(config)

    def depth(self, config: LlamaConfig) -> int:
        """All layers: the verification decides every token."""
        return config.num_layers

    def arguments(self, model: Llama) -> Settings:
        """Exit, length and confidence as numbers, and the rows of the head that the draft uses."""
        head = None if self.vocabulary is None else self.vocabulary.head(model)
        confidence = self.draft_confidence
        confidence = None if confidence is None else jnp.float32(confidence)
        numbers = jnp.int32(self.exit_layer), jnp.int32(self.num_draft_tokens)
        return Settings(*numbers, head, confidence)

    def step(self, model: Llama, state: DecodeState, arguments: Settings) -> DecodeState:
        """One round: draft, verify, commit what agrees and one token more."""
        return self.verify(model, self.draft(model, state, arguments), arguments)

    def draft(self, model: Llama, state: DecodeState, settings: Settings) -> Draft:
        """Up to d tokens per row from the exit.

        A row drafts no further than its end (the verification adds one token of its own), not
        beyond a stop token, and no longer than the exit is sure of the whole draft; the loop ends
        when no row drafts.
        """
        batch, steps = state.length_B.shape[0], 1 + self.lengths[-1]
        room_B = jnp.where(state.running_B, state.end_B - state.length_B - 1, 0)
        limit_B = jnp.minimum(room_B, settings.num_draft_tokens)

        draws = state.draws

        def choose(
            found: tuple[Proposals, Float[Array, " B"]],
            x_BTD: Float[Array, "B 1 D"],
            i: Int[Array, ""],
        ) -> tuple[Proposals, Float[Array, " B"]]:
            """Draft number i, by the exit's logits, and how probable the draft is with it."""
            (carry, probability_B), head = found, settings.head
            logits_BTN = model.unembed(x_BTD, None if head is None else head.table_ND)
            logits_BTN = state.penalised(
                logits_BTN,
                i,
                _tokens(carry.index_BT, head),
                None if head is None else head.places_V,
            )
            if settings.confidence is not None:
                # Of the likeliest tokens, not of those that are drawn: if what is drawn decided
                # whether it counts, texts would not have the model's distribution.
                over_BTN = jnp.exp(logits_BTN - logits_BTN.max(-1, keepdims=True))
                probability_B = probability_B / over_BTN[:, 0].sum(-1)
            if draws is None:
                index_B = likeliest(logits_BTN[:, 0])
                log_q_BTN = carry.log_q_BTN
            else:
                log_BTN = draws.log_probs(logits_BTN)
                index_B = draws.token(jnp.exp(log_BTN[:, 0]), state.length_B + i, Purpose.DRAFT)
                log_q_BTN = lax.dynamic_update_slice_in_dim(carry.log_q_BTN, log_BTN, i, axis=1)
            index_BT = lax.dynamic_update_slice_in_dim(carry.index_BT, index_B[:, None], i, axis=1)
            return Proposals(index_BT, log_q_BTN), probability_B

        def more(carry):
            return carry[0]

        def step(carry):
            _, i, cache, token_B, hidden_BTD, proposals, probability_B, drafted_B, active_B = carry
            positions_BT = state.length_B[:, None] - 1 + i
            x_BTD = model.embed(token_B[:, None])
            for lo, hi in pairwise((0, *self.exits)):
                x_BTD, cache = _run_if(
                    True if lo == 0 else settings.exit_layer >= hi,
                    lambda x, cache, lo=lo, hi=hi: model.run_layers(x, lo, hi, positions_BT, cache),
                    x_BTD,
                    cache,
                )
            hidden_BTD = lax.dynamic_update_slice_in_dim(hidden_BTD, x_BTD, i, axis=1)
            active_B &= i < limit_B
            # The last pass drafts nothing; its column is a spare.
            found = proposals, probability_B
            proposals, probability_B = lax.cond(
                active_B.any(), choose, lambda found, *_: found, found, x_BTD, i
            )
            if settings.confidence is not None:
                active_B &= probability_B >= settings.confidence
            token_B = _tokens(proposals.index_BT[:, i], settings.head)
            drafted_B += active_B
            active_B &= ~state.is_stop(token_B)
            going = active_B.any()  # then the new token must pass the first layers too
            found = hidden_BTD, proposals, probability_B
            return going, i + 1, cache, token_B, *found, drafted_B, active_B

        size = self.draft_vocab or model.config.vocab_size
        start = (
            True,
            0,
            state.cache,
            state.pending_B,
            jnp.zeros((batch, steps, model.config.hidden_size), model.dtype),
            Proposals(
                jnp.zeros((batch, steps), jnp.int32),
                None if draws is None else jnp.zeros((batch, steps, size), jnp.float32),
            ),
            jnp.ones(batch, jnp.float32),
            jnp.zeros(batch, jnp.int32),
            state.running_B,
        )
        with jax.named_scope(DRAFT):
            end = lax.while_loop(more, step, start)
        _, _, cache, _, hidden_BTD, proposals, _, count_B, _ = end
        tokens_BT = _tokens(proposals.index_BT, settings.head)
        return Draft(state.with_cache(cache), hidden_BTD, tokens_BT, count_B, proposals)

    def verify(self, model: Llama, draft: Draft, settings: Settings) -> DecodeState:
        """The remaining layers on the pending token and the drafts, all at once; then the drafts
        that stand, and one token of the whole model's."""
        state, longest = draft.state, draft.count_B.max()

        def judged(cache: KVCache, new_BT, _, log_probs_BT, length: int):
            """The verification for `length` drafts at most: tokens, how many are drafts, and their
            log-probabilities."""
            positions_BT = state.length_B[:, None] - 1 + jnp.arange(1 + length)
            x_BTD = draft.hidden_BTD[:, : 1 + length]
            for lo, hi in pairwise((*self.exits, model.config.num_layers)):
                x_BTD, cache = _run_if(
                    True if lo == self.exits[-1] else settings.exit_layer <= lo,
                    lambda x, cache, lo=lo, hi=hi: model.run_layers(x, lo, hi, positions_BT, cache),
                    x_BTD,
                    cache,
                )
            rule = accept_equal if state.draws is None else accept_by_ratio
            logits_BTV = model.unembed(x_BTD)
            changed_BTV = state.penalised(logits_BTV, 0, draft.tokens_BT)
            found_BT, accepted_B = rule(changed_BTV, draft, settings.head)
            found = (found_BT, state.log_probs(logits_BTV, found_BT))
            new_BT, log_probs_BT = jax.tree.map(
                lambda buffer, new: lax.dynamic_update_slice(buffer, new, (0, 0)),
                (new_BT, log_probs_BT),
                found,
            )
            return cache, new_BT, accepted_B, log_probs_BT

        carry = (
            state.cache,
            jnp.zeros_like(draft.tokens_BT),
            jnp.zeros_like(draft.count_B),
            None if state.log_probs_BS is None else jnp.zeros(draft.tokens_BT.shape, jnp.float32),
        )
        for shorter, length in pairwise((-1, *self.lengths)):
            carry = _run_if(
                True if len(self.lengths) == 1 else (shorter < longest) & (longest <= length),
                lambda *carry, length=length: judged(*carry, length),
                *carry,
            )
        cache, new_BT, accepted_B, log_probs_BT = carry
        return state.with_cache(cache).commit(
            new_BT,
            accepted_B + 1,
            accepted_B=accepted_B,
            drafted_B=draft.count_B,
            draft_BT=draft.tokens_BT,
            log_probs_BT=log_probs_BT,
        )


def in_one_program(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The same strategies; those that speculate share one compiled program."""
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    if len(drafting) < 2:
        return list(strategies)
    choices = Choices.covering(
        (one.exit_layer for one in drafting),
        (length for one in drafting for length in one.lengths),
    )
    return [replace(one, choices=choices) if one in drafting else one for one in strategies]


def _tokens(index: Int[Array, "*any"], head: DraftHead | None) -> Int[Array, "*any"]:
    """Token ids of indices among the tokens that may be drafted."""
    return index if head is None else head.ids_N[index]


def _run_if(condition: Bool[Array, ""] | bool, run: Callable, *carry):
    """`run(*carry)`, or the carry as it is; no branch where the condition is known. Other than
    `lax.switch` over whole programs, a `cond` around a part updates the cache in place."""
    if condition is True:
        return run(*carry)
    return lax.cond(condition, run, lambda *carry: carry, *carry)
