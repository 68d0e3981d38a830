"""Self-speculative decoding (section 4.3): the first layers draft, the others verify, on one cache.

One round for one row, exit E = 2 of L = 4 layers, d = 3 drafts. The pending token is p:

    layers 2..3                        v v v v     verification: all four positions at once,
    layers 0..1   p   a   b   c        ^ ^ ^ ^     from the exit hidden states kept below
                  |   |   |   |        h h h h  <- (the paper's "KVQ" cache)
    draft head    a   b   c   -
    full head                          a b x y     the full model's tokens after p, a, b, c
                                       = = !
    committed     a   b   x                        two accepted drafts and one correction;
                                                   c is dropped: its slots get overwritten

Layers 0..E-1 never run twice on a token: the verification reads the draft's keys and values, too.
The last draft token passes the first layers without a head, as nothing is drafted after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.acceptance import AcceptanceRule, judge
from lsjax.decoding.confidence import Confidence, Together
from lsjax.decoding.draft import Draft, DraftArguments, Places
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.guards import at_shortest_length
from lsjax.decoding.scopes import DRAFT, VERIFY
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Speculative
from lsjax.model.protocol import DecoderModel, draft_state, run_through


@dataclass(frozen=True)
class SelfSpeculative(Speculative):
    """Same greedy tokens as Autoregressive in fewer passes. Sampling keeps the distribution.

    exit_layer: E, layers of the draft. num_draft_tokens: d, drafts per round and row; 0 makes each
    round one autoregressive step. vocabulary: tokens that may be drafted, all by default.
    draft_confidence: stops drafting when the product of the exit's top-token probabilities falls
    below this value. accept: acceptance rule (acceptance.py); by default the lossless rule.
    """

    name = "self_speculative"
    exit_layer: int = field()  # required: hides the None of the base class
    num_draft_tokens: int = field()
    vocabulary: DraftVocabulary | None = None
    draft_confidence: float | None = None
    accept: AcceptanceRule | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Draft lengths with a verification of their own: quarters of d if drafts may end early."""
        quarters = (4,) if self.draft_confidence is None else range(5)
        return tuple(sorted({self.num_draft_tokens * quarter // 4 for quarter in quarters}))

    def arguments(self, model: DecoderModel) -> DraftArguments:
        """The head's rows of the draft vocabulary, and the confidence."""
        return DraftArguments.create(model, self.vocabulary, self.draft_confidence)

    def round(
        self, model: DecoderModel, state: DecodeState, arguments: DraftArguments
    ) -> DecodeState:
        """One round."""
        return speculative_round(self, model, model, self.exit_layer, state, arguments)[0]


def speculative_round(
    settings: SelfSpeculative,
    drafter: DecoderModel,
    model: DecoderModel,
    verified_from: int,
    state: DecodeState,
    arguments: DraftArguments,
    keep: tuple[int, ...] = (),
) -> tuple[DecodeState, dict[int, Float[Array, "B T D"]]]:
    """Drafts, verifies, and commits the accepted tokens plus one.

    verified_from: first layer of the verification: the exit, if `drafter` is the model itself.
    keep: exits whose states are returned. State t belongs to the position before new token t.
    """
    first, last, longest = settings.exit_layer, model.num_layers, settings.num_draft_tokens
    below = [exit_layer for exit_layer in sorted(keep) if exit_layer < min(first, verified_from)]
    above = [exit_layer for exit_layer in sorted(keep) if verified_from < exit_layer < last]

    def first_layers(x_B1D, positions_B1, cache):
        places = Places.of(drafter, positions_B1)
        hidden, cache = run_through(drafter, (0, *below, first), x_B1D, *places, cache)
        x_B1D, cache = draft_state(drafter, first, hidden[-1], positions_B1, cache)
        return x_B1D, hidden, cache

    def verify(draft, places):
        x_BTD, cache = draft.hidden[-1], draft.state.cache
        if verified_from != first:
            x_BTD = model.embed(draft.inputs_BT, places.positions_BT)
        bounds = verified_from, *above, last
        hidden, cache = run_through(model, bounds, x_BTD, *places, cache)
        verified, _ = judge(model, draft, hidden[-1], cache, settings.accept)
        found = zip((*below, first, *above), (*draft.hidden, *hidden[:-1]), strict=True)
        return replace(verified, seen={exit_: x_BTD for exit_, x_BTD in found if exit_ in keep})

    limit_B = jnp.minimum(state.end_B - state.length_B - 1, longest)
    draft = Draft.empty(drafter, state, arguments, 1 + longest, kept=1 + len(below))
    draft = draft_tokens(drafter, first_layers, draft, limit_B, arguments.confidence)
    with jax.named_scope(VERIFY):
        places = Places.of(model, draft.positions_BT)
        verified = at_shortest_length(settings.lengths, draft, places, verify)
        return verified.commit(draft, first), verified.seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftLoop:
    """The draft before step `at`, which runs the pending token (0) or draft `at` - 1."""

    at: Int[Array, ""]
    token_B: Int[Array, " B"]
    active_B: Bool[Array, " B"]  # rows that go on
    sure_B: Float[Array, " B"]  # product of the drafts' chances to pass
    draft: Draft


def draft_tokens(
    drafter: DecoderModel,
    first_layers: Callable,
    draft: Draft,
    limit_B: Int[Array, " B"],
    confidence: Confidence | Together | None,
    active: Bool[Array, ""] | bool = True,
) -> Draft:
    """Drafts up to `limit_B` tokens per row. A row stops at its limit, at a stop token, or when the
    confidence is too low. first_layers: (x_B1D, positions_B1, cache) -> the state that drafts, the
    states to keep, and the cache. active: whether to draft at all."""
    state = draft.state

    def step(loop: DraftLoop) -> DraftLoop:
        at, draft, sure_B = loop.at, loop.draft, loop.sure_B
        positions_B1 = state.length_B[:, None] - 1 + at
        x_B1D = drafter.embed(loop.token_B[:, None], positions_B1)
        x_B1D, hidden, cache = first_layers(x_B1D, positions_B1, draft.state.cache)
        draft = draft.with_states(at, hidden, cache)
        active_B = loop.active_B & (at < limit_B)
        if confidence is not None:  # the head can't raise sure_B: spare it
            active_B = confidence.go_on(active_B, sure_B, at)
        chosen = draft.choose_if(active_B.any(), drafter, x_B1D, at)
        draft = draft.with_token(at, chosen)
        if confidence is not None:
            sure_B = sure_B * confidence.chance(chosen.top_B1, at)
            active_B = confidence.go_on(active_B, sure_B, at)  # else the new token does not count
        draft = replace(draft, count_B=draft.count_B + active_B)
        active_B &= ~state.is_stop(chosen.token_B)
        return DraftLoop(at + 1, chosen.token_B, active_B, sure_B, draft)

    sure_B = jnp.ones_like(limit_B, jnp.float32)
    start = DraftLoop(jnp.int32(0), state.pending_B, state.running_B & active, sure_B, draft)
    with jax.named_scope(DRAFT):
        return lax.while_loop(lambda loop: loop.active_B.any(), step, start).draft
