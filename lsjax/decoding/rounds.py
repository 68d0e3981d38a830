"""Mechanics of a round: draft with the first layers, verify with the others.

With several exits, a branch guards the layers between them. With several lengths, a branch guards
each verification. Exit and draft length are runtime arguments.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig
from lsjax.decoding.draft import AcceptanceRule, Draft, DraftHead, accept_block, accept_equal
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy, check_exit
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama
from lsjax.model.rope import rope_angles

DRAFT, VERIFY = "draft", "verify"  # names of the parts in compiled programs
LEVELS = (0.4, 0.6, 0.8, 0.95)  # of an exit's top probability


def guard_of_length(length: int) -> str:
    """Name of the branch that verifies up to `length` drafts, in compiled programs."""
    return f"up_to_{length}_drafts"


def guard_of_layers(lo: int, hi: int) -> str:
    """Name of the branch around layers lo..hi-1, in compiled programs."""
    return f"layers_{lo}_to_{hi - 1}"


class RoundSettings(NamedTuple):
    """Arguments of a compiled round.

    confidence: minimum product of the drafts' chances to pass, for each draft; one row may serve
    all. A chance is the exit's top probability, or chances_BC at its level (`confidence_level`).
    """

    exit_layer: Int[Array, ""]
    num_draft_tokens: Int[Array, ""]
    head: DraftHead | None
    confidence: Float[Array, "B T"] | None = None
    chances_BC: Float[Array, "B C"] | None = None


def top_probability(logits: Float[Array, "... N"]) -> Float[Array, "..."]:
    """Highest probability of the distribution that the logits give."""
    return 1 / jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1)


def confidence_level(top: Float[Array, "..."]) -> Int[Array, "..."]:
    """Level of a top probability: 0 below the first of LEVELS, 1 from there on, and so on."""
    return (top[..., None] >= jnp.array(LEVELS)).sum(-1)


class Drafting(Strategy):
    """A strategy of rounds that draft and verify.

    exits: those that its program serves, ascending. lengths: each round verifies with the shortest
    that fits. accept: acceptance rule; None is the lossless one.
    """

    exits: tuple[int, ...]
    accept: AcceptanceRule | None = None

    @property
    def sources(self) -> tuple[int, ...]:
        """The exits; first exit 0, which runs no layers, if drafts may come from elsewhere."""
        return self.exits

    @property
    def program(self) -> tuple:
        """Static settings that `step` reads. `arguments` carries the rest at run time."""
        ends_early = self.draft_confidence is not None
        return type(self), self.exits, self.lengths, self.draft_vocab, ends_early, self.accept

    @property
    def widths(self) -> tuple[int, ...]:
        """Lengths for which the program that is traced has a verification of its own."""
        return self.lengths

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if an exit is out of range or the vocabulary does not match."""
        for exit_layer in self.exits:
            check_exit(exit_layer, config.num_layers - 1)  # the draft does not run all layers
        if self.vocabulary is not None:
            self.vocabulary.validate(config)

    def limit(self, state: DecodeState, settings: RoundSettings) -> Int[Array, " B"]:
        """Maximum drafts of each row. Leaves room for the token that the verification adds."""
        return jnp.minimum(state.end_B - state.length_B - 1, settings.num_draft_tokens)

    def draft(
        self, model: Llama, state: DecodeState, settings: RoundSettings, begun: Draft | None = None
    ) -> Draft:
        """Up to d tokens per row from the exit. A row stops drafting at its limit, at a stop token,
        or when confidence is too low. begun: the draft of exit 0."""
        head, draws, limit_B = settings.head, state.draws, self.limit(state, settings)
        table_ND, places_V = (None, None) if head is None else (head.table_ND, head.places_V)
        if not self.exits:
            return begun

        def choose(x_BTD, i, tokens_BT, log_q_BTN, top_BT, sure_B):
            """Chooses draft i of each row from the exit's logits, and updates the confidence."""
            logits_BTN = model.unembed(x_BTD, table_ND)
            logits_BTN = state.penalised(logits_BTN, i, tokens_BT, places_V)
            if settings.confidence is not None:
                # Not the sampled token's probability: that would bias the distribution.
                top_B1 = top_probability(logits_BTN)
                top_BT = lax.dynamic_update_slice_in_dim(top_BT, top_B1, i, axis=1)
                if settings.chances_BC is not None:
                    level_B1 = confidence_level(top_B1)
                    top_B1 = jnp.take_along_axis(settings.chances_BC, level_B1, axis=1)
                sure_B = sure_B * top_B1[:, 0]
            if draws is None:
                index_B = argmax(logits_BTN[:, 0])
            else:
                log_BTN = draws.log_probs(logits_BTN)
                index_B = draws.token(jnp.exp(log_BTN[:, 0]), state.length_B, Purpose.DRAFT, i)
                log_q_BTN = lax.dynamic_update_slice_in_dim(log_q_BTN, log_BTN, i, axis=1)
            token_B = index_B if head is None else head.ids_N[index_B]
            tokens_BT = lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], i, axis=1)
            return tokens_BT, log_q_BTN, top_BT, sure_B

        def step(carry):
            """Runs the first layers on token i of each row, and drafts for the active rows."""
            active_B, i, cache, token_B, sure_B, drafts = carry
            hidden, tokens_BT, log_q_BTN, top_BT, count_B = drafts
            positions_B1 = state.length_B[:, None] - 1 + i
            reached, cache = _run_segments(
                model,
                (0, *self.sources),
                lambda lo, hi: lo == 0 or settings.exit_layer >= hi,
                model.embed(token_B[:, None]),
                positions_B1,
                rope_angles(positions_B1, model.config, model.dtype),
                cache,
            )
            x_BTD = reached[-1]
            hidden = tuple(
                lax.dynamic_update_slice_in_dim(kept_BTD, one_BTD, i, axis=1)
                for kept_BTD, one_BTD in zip(hidden, reached, strict=True)
            )
            active_B &= i < limit_B
            if settings.confidence is not None:  # the head can't raise sure_B: spare it
                active_B &= sure_B >= settings.confidence[:, i]
            # The last pass drafts nothing; its column is unused.
            tokens_BT, log_q_BTN, top_BT, sure_B = lax.cond(
                active_B.any(),
                choose,
                lambda x_BTD, i, *drafts: drafts,
                *(x_BTD, i, tokens_BT, log_q_BTN, top_BT, sure_B),
            )
            if settings.confidence is not None:
                active_B &= sure_B >= settings.confidence[:, i]
            token_B, count_B = tokens_BT[:, i], count_B + active_B
            active_B &= ~state.is_stop(token_B)
            drafts = (hidden, tokens_BT, log_q_BTN, top_BT, count_B)
            return active_B, i + 1, cache, token_B, sure_B, drafts

        active_B = state.running_B
        if begun is None:
            begun = self.no_draft(model, state, settings)
        else:
            active_B &= settings.exit_layer > 0
        drafts = (begun.hidden, begun.tokens_BT, begun.log_q_BTN, begun.top_BT, begun.count_B)
        sure_B = jnp.ones_like(limit_B, jnp.float32)
        start = (active_B, 0, state.cache, state.pending_B, sure_B, drafts)
        with jax.named_scope(DRAFT):
            _, _, cache, _, _, drafts = lax.while_loop(lambda carry: carry[0].any(), step, start)
        hidden, tokens_BT, log_q_BTN, top_BT, count_B = drafts
        return Draft(state.with_cache(cache), hidden, tokens_BT, count_B, log_q_BTN, head, top_BT)

    def no_draft(self, model: Llama, state: DecodeState, settings: RoundSettings) -> Draft:
        """A draft without tokens."""
        shape_BT, head = (len(state.length_B), 1 + self.lengths[-1]), settings.head
        size = model.config.vocab_size if head is None else len(head.ids_N)
        none_BTD = jnp.zeros((*shape_BT, model.config.hidden_size), model.dtype)
        return Draft(
            state,
            (none_BTD,) * len(self.sources),
            jnp.zeros(shape_BT, jnp.int32),
            jnp.zeros_like(state.length_B),
            None if state.draws is None else jnp.zeros((*shape_BT, size), jnp.float32),
            head,
            None if settings.confidence is None else jnp.zeros(shape_BT, jnp.float32),
        )

    @jax.named_scope(VERIFY)
    def verify(
        self,
        model: Llama,
        draft: Draft,
        settings: RoundSettings,
        look: Callable = lambda *_: None,
        unseen: Any = None,
    ) -> tuple[DecodeState, Int[Array, "B T"], Int[Array, " B"], Any]:
        """Runs the other layers on the pending token and the drafts in one pass. Commits the
        accepted drafts and one token of the full model.

        look: called with the hidden states [B, T, D] of each exit, the full model's logits after
        penalties, the new tokens, and the accepted count. Its result has the form of `unseen`, and
        is the last one returned, after the state, the new tokens and the accepted count.
        """
        state, longest, steps = draft.state, draft.count_B.max(), draft.tokens_BT.shape[1]
        rule = self.accept or (accept_equal if state.draws is None else accept_block)
        positions_BT = state.length_B[:, None] - 1 + jnp.arange(steps)
        # Inside of the branches, XLA would compute the angles again in each layer.
        ropes = rope_angles(positions_BT, model.config, model.dtype)

        def judge(length: int, cache: KVCache, *_):
            """Verifies up to `length` drafts; returns the values of `carry` below."""
            some = draft.first(1 + length)
            reached, cache = _run_segments(
                model,
                (*self.sources, model.config.num_layers),
                lambda lo, hi: lo == self.sources[-1] or settings.exit_layer <= lo,
                some.hidden[0],
                *jax.tree.map(lambda x: x[:, : 1 + length], (positions_BT, ropes)),
                cache,
                some.hidden[1:],
            )
            logits_BTV = model.unembed(reached[-1])
            changed_BTV = state.penalised(logits_BTV, 0, draft.tokens_BT)
            new_BT, accepted_B = rule(changed_BTV, some)
            seen = look((some.hidden[0], *reached[:-1]), changed_BTV, new_BT, accepted_B)
            found = new_BT, state.log_probs(logits_BTV, new_BT)
            more = ((0, 0), (0, steps - 1 - length))
            return cache, accepted_B, seen, *jax.tree.map(lambda x_BT: jnp.pad(x_BT, more), found)

        empty_BT = jnp.zeros_like(draft.tokens_BT)
        log_probs_BT = None if state.log_probs_BS is None else empty_BT.astype(jnp.float32)
        carry = (state.cache, jnp.zeros_like(draft.count_B), unseen, empty_BT, log_probs_BT)
        for shorter, length in pairwise((-1, *self.widths)):
            fits = len(self.widths) == 1 or (shorter < longest) & (longest <= length)
            carry = _run_if(guard_of_length(length), fits, partial(judge, length), *carry)
        cache, accepted_B, seen, new_BT, log_probs_BT = carry
        done = state.with_cache(cache).commit(
            new_BT,
            accepted_B,
            drafted_B=draft.count_B,
            draft_BT=draft.tokens_BT,
            log_probs_BT=log_probs_BT,
            source=settings.exit_layer,
        )
        return done, new_BT, accepted_B, seen


def _run_segments(model, bounds, runs, x_BTD, positions_BT, ropes, cache, kept=()):
    """Runs layers lo..hi-1 for each adjacent pair in `bounds`, if `runs(lo, hi)`. Returns the
    hidden states after each pair (`kept`, or as before it, if it does not run) and the cache."""
    reached = []
    for (lo, hi), kept_BTD in zip_longest(pairwise(bounds), kept):
        start_BTD = x_BTD

        def run(_, cache, lo=lo, hi=hi, start_BTD=start_BTD):
            return model.run_layers(start_BTD, lo, hi, positions_BT, cache, ropes)

        if lo < hi:
            other_BTD = x_BTD if kept_BTD is None else kept_BTD
            x_BTD, cache = _run_if(guard_of_layers(lo, hi), runs(lo, hi), run, other_BTD, cache)
        reached.append(x_BTD)
    return reached, cache


def _run_if(name: str, condition: Bool[Array, ""] | bool, run: Callable, *carry):
    """`run(*carry)` if the condition holds, else the carry. The branch is a loop of at most one
    trip, which updates the cache in place. Around a `cond`, XLA copies the cache on GPUs. name: of
    the loop in compiled programs."""
    if condition is True:
        return run(*carry)

    def once(carry):
        return jnp.zeros((), bool), *run(*carry[1:])

    with jax.named_scope(name):
        return lax.while_loop(lambda carry: carry[0], once, (condition, *carry))[1:]
