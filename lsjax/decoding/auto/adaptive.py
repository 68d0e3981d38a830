"""The strategy auto: a round of whatever source and length it chooses (lsjax/decoding/auto)."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import check
from lsjax.decoding.acceptance import judge
from lsjax.decoding.auto.choose import Choice, choose
from lsjax.decoding.auto.learned import (
    MOST_IDLE_TOKENS,
    Counts,
    Learned,
    expected_counts,
    idle_tokens,
)
from lsjax.decoding.auto.lookup import look_up
from lsjax.decoding.auto.scores import scores
from lsjax.decoding.auto.segments import Segment, chosen_state, draft_states, run_segments
from lsjax.decoding.draft import Draft, DraftArguments, Places
from lsjax.decoding.draft_vocabulary import DraftHead, DraftVocabulary
from lsjax.decoding.guards import at_shortest_length
from lsjax.decoding.scopes import VERIFY
from lsjax.decoding.self_speculative import draft_tokens
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Speculative, with_next_token
from lsjax.kernels.decoding import verification_lengths
from lsjax.model.protocol import DecoderModel, Sizes, bytes_per_token, num_bytes

# Rounds from one score of all exits to the next, at least, and the share of bytes for scores.
SCORED_EVERY, SCORES_SHARE = 4, 0.01


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AutoArguments:
    """What a compiled round takes at run time."""

    # Seconds of a round with each source (lookup, then the exits) and draft length; infinite for
    # choices that are never taken.
    seconds_QJ: Float[Array, "Q J"]
    head: DraftHead | None  # of a draft vocabulary

    def with_seconds(self, seconds_QJ: Float[Array, "Q J"]) -> "AutoArguments":
        """The same with other seconds, on the same devices."""
        place = self.seconds_QJ.sharding
        return replace(self, seconds_QJ=jax.device_put(seconds_QJ, place))


@dataclass(frozen=True)
class Adaptive(Speculative):
    """The same greedy tokens as Autoregressive, and the same distribution of sampled ones.

    exits: those that may draft, ascending; none for a model without LayerSkip. vocabulary: tokens
    that exits may draft; in sampling it limits lookups too. lengths: draft lengths, from 0.
    seconds: of a round with each source and length; by default an engine measures them.
    agreement: share of each exit's greedy drafts that are right, if it is known beforehand.
    """

    name, pauses = "auto", True
    exits: tuple[int, ...] = ()
    vocabulary: DraftVocabulary | None = None
    lengths: tuple[int, ...] = (0, 2, 6, 15)
    seconds: tuple[tuple[float, ...], ...] | None = None
    agreement: tuple[float, ...] = ()

    @property
    def sources(self) -> tuple[int, ...]:
        """Exit 0 for lookups, then the exits."""
        return 0, *self.exits

    def validate(self, sizes: Sizes) -> None:
        """Raises ConfigError if a number is out of range or the vocabulary does not match."""
        super().validate(sizes)
        exits, lengths, seconds = self.exits, self.lengths, np.shape(self.seconds)
        check(exits == tuple(sorted({*exits})), f"exits {exits} must ascend")
        good = lengths[:1] == (0,) and lengths[1:] and lengths == tuple(sorted({*lengths}))
        check(good, f"lengths {lengths} must ascend from 0, with at least one draft length")
        known = len(self.agreement)
        check(known in (0, len(exits)), f"{known} agreements are given for {len(exits)} exits")
        shape = len(self.sources), len(lengths)
        check(seconds in ((), shape), f"seconds have the shape {seconds}, not {shape}")

    def arguments(self, model: DecoderModel) -> AutoArguments:
        """Equal seconds until they are measured, and the rows of the head that exits draft with."""
        seconds_QJ = self.seconds or np.ones((len(self.sources), len(self.lengths)))
        return AutoArguments(
            jnp.asarray(seconds_QJ, jnp.float32),
            None if self.vocabulary is None else self.vocabulary.head(model),
        )

    def scored_every(self, model: DecoderModel) -> int:
        """Rounds from one score of all exits to the next."""
        ids_W = np.arange(self.draft_vocab or model.vocab_size)
        rows = jax.eval_shape(lambda model: model.head_rows(ids_W), model)
        # A score reads a head for each exit, and exit blocks once more.
        read = len(self.exits) * num_bytes(rows) + num_bytes(getattr(model, "exit_blocks", ()))
        return max(SCORED_EVERY, math.ceil(read / (SCORES_SHARE * bytes_per_token(model))))

    def first_guess(self, batch: int, lesson: Counts | None = None) -> Learned:
        """Counts before the first round: those of the exits in the last text, or that agree with
        what training measured, or none."""
        learned = Learned.create(batch, len(self.exits))
        if lesson is None and self.agreement:
            lesson = expected_counts(self.agreement)
        return learned if lesson is None else learned.with_lesson(lesson)

    def lesson(self, state: DecodeState, row: int) -> Counts | None:
        """Counts of the exits in a greedy text: in sampling, chances are others."""
        return state.learned.lesson(row) if self.exits and state.sampling is None else None

    def round(
        self, model: DecoderModel, state: DecodeState, arguments: AutoArguments
    ) -> DecodeState:
        """One round with the best source and length."""
        learned, longest = state.learned, self.lengths[-1]
        matched_B, proposal_BT = look_up(state.tokens_BS, state.length_B, longest)
        choice = choose(
            self.exits, self.lengths, model.num_layers, state, matched_B, arguments.seconds_QJ
        )
        draft = self.proposed(model, state, choice, arguments.head, proposal_BT)
        draft = self.drafted(model, draft, choice) if self.exits else draft
        # Not in the first rounds: seconds are measured in them, and scores would be part of these.
        # Rounds that are far apart are all scored: little is known of the text between them.
        every = self.scored_every(model)
        far_apart = idle_tokens(learned.idle_B).max() == MOST_IDLE_TOKENS
        due = far_apart | (learned.rounds_B.max() % every == every - 1)

        def verify(draft, places):
            # Segments below the exit ran in the draft, which kept their states.
            last = self.sources[-1]
            segments = [
                Segment(lo, hi, choice.exit_layer <= lo, kept_BTD)
                for (lo, hi), kept_BTD in zip(pairwise(self.sources), draft.hidden[1:], strict=True)
            ]
            segments.append(Segment(last, model.num_layers, True))
            reached, cache = run_segments(
                model, segments, draft.hidden[0], places, draft.state.cache
            )
            given = model, self.exits, reached, places.positions_BT
            _, cache = draft_states(*given, cache)
            verified, logits_BTV = judge(model, draft, reached[-1], cache, None)
            new = logits_BTV, verified.tokens_BT, verified.accepted_B

            def drafting_states():  # computed again if all exits are scored, which is seldom
                return draft_states(*given, cache)[0]

            seen = scores(model, self.exits, draft, choice.exit_layer, due, drafting_states, *new)
            return replace(verified, seen=seen)

        with jax.named_scope(VERIFY):
            places = Places.of(model, draft.positions_BT)
            lengths = verification_lengths(self.lengths)
            verified = at_shortest_length(lengths, draft, places, verify)
            done = verified.commit(draft, choice.exit_layer)
        after = learned.after(verified, matched_B, proposal_BT, choice.is_idle)
        return replace(done, learned=after)

    def proposed(
        self,
        model: DecoderModel,
        state: DecodeState,
        choice: Choice,
        head: DraftHead | None,
        proposal_BT: Int[Array, "B T"],
    ) -> Draft:
        """The draft of exit 0: looked-up tokens, whose distributions are points."""
        columns, kept = 1 + self.lengths[-1], len(self.sources)
        none = Draft.empty(model, state, DraftArguments(head, choice.confidence), columns, kept)
        tokens_BT = jnp.pad(proposal_BT, ((0, 0), (0, 1)))
        limit_B, log_q_BTW = self.limit(state, choice), none.log_q_BTW
        if log_q_BTW is not None:
            index_BT, size = tokens_BT, log_q_BTW.shape[-1]
            if head is not None:  # tokens outside of the vocabulary end the draft
                index_BT = head.places_V[tokens_BT]
                known_BT = jnp.cumprod(index_BT < size, axis=1)
                limit_B = jnp.minimum(limit_B, known_BT.sum(1))
            is_token_BTW = index_BT[..., None] == jnp.arange(size)
            log_q_BTW = jnp.where(is_token_BTW, 0, -jnp.inf)
        count_B = jnp.where(state.running_B & (choice.exit_layer == 0), limit_B, 0)
        proposed = replace(none, tokens_BT=tokens_BT, count_B=count_B, log_q_BTW=log_q_BTW)
        first_BTD = model.embed(proposed.inputs_BT, proposed.positions_BT)
        return replace(proposed, hidden=(first_BTD, *none.hidden[1:]))

    def drafted(self, model: DecoderModel, draft: Draft, choice: Choice) -> Draft:
        """The draft of the chosen exit. Returns `draft` unchanged if the choice is a lookup, or to
        draft nothing."""

        def first_layers(x_B1D, positions_B1, cache):
            segments = [
                Segment(lo, hi, lo == 0 or choice.exit_layer >= hi)
                for lo, hi in pairwise(self.sources)
            ]
            places = Places.of(model, positions_B1)
            states, cache = run_segments(model, segments, x_B1D, places, cache)
            given = states, positions_B1, cache
            drafting_B1D, cache = chosen_state(model, self.exits, choice.exit_layer, *given)
            return drafting_B1D, (x_B1D, *states), cache

        limit_B, active = self.limit(draft.state, choice), choice.exit_layer > 0
        return draft_tokens(model, first_layers, draft, limit_B, choice.confidence, active)

    def limit(self, state: DecodeState, choice: Choice) -> Int[Array, " B"]:
        """Maximum drafts of each row. Leaves room for the token that the verification adds."""
        return jnp.minimum(state.end_B - state.length_B - 1, choice.num_draft_tokens)

    def wants_another(self, state: DecodeState) -> Bool[Array, ""]:
        """Unless tokens are to be made without a choice."""
        return _waits(state) == 0

    def pause(self, model: DecoderModel, state: DecodeState, most: Int[Array, ""]) -> DecodeState:
        """Appends the tokens that are to be made without a choice, by autoregressive rounds. Stops
        when a row ends, or the cache has no room for another round."""
        running_B = state.running_B

        def more(carry):
            left, current = carry
            return (left > 0) & current.same_rows_and_room(running_B, self.slack)

        def append(carry):
            left, current = carry
            current = with_next_token(model, current, model.num_layers, self.exits)
            wait_B = jnp.maximum(current.learned.wait_B - 1, 0)
            return left - 1, replace(current, learned=replace(current.learned, wait_B=wait_B))

        return lax.while_loop(more, append, (jnp.minimum(_waits(state), most), state))[1]


def _waits(state: DecodeState) -> Int[Array, ""]:
    """Tokens of the running rows to be made before the next choice."""
    return jnp.where(state.running_B, state.learned.wait_B, 0).max()
