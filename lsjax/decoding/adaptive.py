"""Self-speculation that chooses its drafts: source and length are chosen anew in each round.

A round drafts with an exit, looks drafts up in the text (`look_up`), or drafts nothing. Without
drafts it is an autoregressive step. It takes the choice with the most expected tokens per second:

    expected tokens   from counts of what the full model accepted lately. An exit whose drafts pass
                      with probability a gives 1 + a + ... + a^d tokens. A lookup passes with a
                      probability that grows with the number of matching tokens.
    seconds           measured for each choice on this machine (stopwatch.py)

A draft of an exit then ends where further tokens cost more seconds than they are worth. Their
chance to pass depends on the exit's top probability, again by counts. Often nothing is drafted.

Exits that did not draft are scored too, in every fourth round or less often. A round computes their
hidden states anyway. Lookups are scored in every round. All of this is part of the compiled loop.
The choice depends only on earlier rounds, so that sampling stays exact.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.draft import Draft, DraftHead, DraftVocabulary, of_tokens
from lsjax.decoding.learned import Learned, by_level, expected_tokens, look_up
from lsjax.decoding.rounds import Drafting, RoundSettings, top_probability
from lsjax.decoding.sampling import argmax
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.llama import Llama
from lsjax.platforms import Tuning, tuning

# Rounds from one score of all exits to the next, at least, and the share of bytes for their heads.
SCORED_EVERY, SCORES_SHARE = 4, 0.01
# Tokens that accelerators make without a choice, after a choice to draft nothing.
IDLE_TOKENS = 3

# Arguments of a compiled round: seconds of a round with each source (lookup, then the exits) and
# draft length, infinite for choices that are never taken; and rows of a draft vocabulary.
Arguments = tuple[Float[Array, "S D"], DraftHead | None]


@dataclass(frozen=True)
class Adaptive(Drafting):
    """The same greedy tokens as Autoregressive, and the same distribution of sampled ones.

    exits: those that may draft, ascending; none for a model without LayerSkip. vocabulary: tokens
    that exits may draft; in sampling it limits lookups too. lengths: draft lengths, from 0.
    seconds: of a round with each source and length (`Arguments`); by default an engine measures
    them.
    """

    name = "auto"
    exits: tuple[int, ...] = ()
    vocabulary: DraftVocabulary | None = None
    lengths: tuple[int, ...] = (0, 1, 3, 6, 10, 15)
    seconds: tuple[tuple[float, ...], ...] | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The longest only, if all its positions take about as long as one."""
        return self.lengths[-1:] if tuning().is_wide else self.lengths

    @property
    def sources(self) -> tuple[int, ...]:
        """Exit 0 for lookups, then the exits."""
        return 0, *self.exits

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if a number is out of range or the vocabulary does not match."""
        super().validate(config)
        exits, lengths, seconds = self.exits, self.lengths, np.shape(self.seconds)
        check(exits == tuple(sorted({*exits})), f"exits {exits} must ascend")
        good = lengths[:1] == (0,) and lengths[1:] and lengths == tuple(sorted({*lengths}))
        check(good, f"lengths {lengths} must ascend from 0, with at least one draft length")
        sizes = len(self.sources), len(lengths)
        check(seconds in ((), sizes), f"seconds have the shape {seconds}, not {sizes}")

    def arguments(self, model: Llama) -> Arguments:
        """Seconds of each choice, and the rows of the head that exits draft with."""
        # Equal seconds until they are measured.
        seconds_SD = self.seconds or np.ones((len(self.sources), len(self.lengths)))
        head = None if self.vocabulary is None else self.vocabulary.head(model)
        return jnp.asarray(seconds_SD, jnp.float32), head

    def scored_every(self, config: LlamaConfig) -> int:
        """Rounds from one score of all exits to the next."""
        share = (self.draft_vocab or config.vocab_size) / config.vocab_size
        heads = len(self.exits) * share * config.head_params
        whole = config.num_layers * config.layer_params + config.head_params
        return max(SCORED_EVERY, math.ceil(heads / (SCORES_SHARE * whole)))

    def first_guess(self, batch: int) -> Learned:
        """Counts before the first round."""
        return Learned.create(batch, len(self.exits))

    def step(self, model: Llama, state: DecodeState, arguments: Arguments) -> DecodeState:
        """One round with the best source and length."""
        learned = state.learned
        matched_B, proposal_BT = look_up(state.tokens_BS, state.length_B, self.lengths[-1])
        settings = self.choose(model.config.num_layers, state, matched_B, arguments)
        begun = self.proposed(model, state, settings, proposal_BT)
        draft = self.draft(model, state, settings, begun)
        due = learned.rounds_B.max() % self.scored_every(model.config) == 0
        look = partial(self.scores, model, draft, settings.exit_layer, due)
        none = jnp.zeros_like(learned.passed_BEC)
        done, new_BT, accepted_B, counts = self.verify(model, draft, settings, look, (none, none))
        is_idle = (settings.exit_layer == 0) & (settings.num_draft_tokens == 0)
        after = learned.after(new_BT, accepted_B, matched_B, proposal_BT, counts, is_idle)
        return replace(done, learned=after)

    def pauses(self, tuning: Tuning) -> bool:
        """On accelerators, when drafts do not pay. A choice takes many small operations, and
        launching them costs as much as several layers."""
        return tuning.is_wide

    def goes_on(self, state: DecodeState) -> Bool[Array, ""] | bool:
        """On accelerators: unless the last choice was to draft nothing."""
        return ~self._is_idle(state) if self.pauses(tuning()) else True

    def pause(self, model: Llama, state: DecodeState) -> DecodeState:
        """Appends IDLE_TOKENS by autoregressive steps, if the last choice was to draft nothing.
        Stops when a row ends, or the cache has no room for another round."""
        running_B = state.running_B

        def more(carry):
            left, current = carry
            has_room_B = ~current.running_B | (current.length_B + self.slack <= current.capacity)
            return (left > 0) & ((current.running_B == running_B) & has_room_B).all()

        def append(carry):
            left, current = carry
            return left - 1, Autoregressive().step(model, current, ())

        start = jnp.where(self._is_idle(state), IDLE_TOKENS, 0), state
        _, state = lax.while_loop(more, append, start)
        learned = replace(state.learned, idle_B=jnp.zeros_like(state.learned.idle_B))
        return replace(state, learned=learned)

    def _is_idle(self, state: DecodeState) -> Bool[Array, ""]:
        """Whether the last choice for the running rows was to draft nothing."""
        return (state.learned.idle_B & state.running_B).any()

    def choose(
        self, layers: int, state: DecodeState, matched_B: Int[Array, " B"], arguments: Arguments
    ) -> RoundSettings:
        """The source and length with the most expected tokens per second. An exit stops drafting
        where further tokens cost more time than they are worth: often before its first draft."""
        learned, (seconds_SD, head) = state.learned, arguments
        left_B11 = jnp.where(state.running_B, state.end_B - state.length_B, 0)[:, None, None]
        # An exit drafts if it is sure enough, or if rounds without drafts were not measured.
        none_E1 = jnp.nan_to_num(seconds_SD[1:, :1], posinf=0)
        wider_ED = seconds_SD[1:] - none_E1
        least_ED = jnp.where(none_E1 > 0, wider_ED / seconds_SD[0, 0], 0)
        exit_BED, drafts_BED = learned.exit_tokens(self.lengths, least_ED)
        drafts_ED = 1 - jnp.prod(1 - drafts_BED, axis=0, where=left_B11 > 0)
        exit_ED = jnp.nan_to_num(none_E1 + drafts_ED * wider_ED, nan=jnp.inf, posinf=jnp.inf)
        lookup_BD = learned.lookup_tokens(matched_B, self.lengths)
        tokens_BSD = jnp.concatenate([lookup_BD[:, None], exit_BED], axis=1)
        tokens_SD = jnp.minimum(tokens_BSD, left_B11).sum(0)
        rate_SD = tokens_SD / jnp.concatenate([seconds_SD[:1], exit_ED])
        source, index = jnp.divmod(argmax(rate_SD.reshape(-1)), len(self.lengths))
        exit_layer, length = jnp.array(self.sources)[source], jnp.array(self.lengths)[index]
        if not self.exits:
            return RoundSettings(exit_layer, length, head)
        own, at_most = jnp.maximum(source - 1, 0), jnp.where(source > 0, self.lengths[-1], length)
        seconds_BT = self.seconds_of_drafts(
            seconds_SD[source], (1 - exit_layer / layers) * seconds_SD[0], learned.chance_BE[:, own]
        )
        rate = rate_SD.max() / state.running_B.sum()  # of a row
        # At most 1, the confidence before the first draft: so the exit's head runs at least once.
        sure_BT = jnp.minimum(rate * seconds_BT, 1)
        return RoundSettings(exit_layer, at_most, head, sure_BT, learned.chances_BEC[:, own])

    def seconds_of_drafts(
        self,
        round_D: Float[Array, " D"],
        verified_D: Float[Array, " D"],
        chance_B: Float[Array, " B"],
    ) -> Float[Array, "B T"]:
        """Seconds of each further draft, over the tokens expected of it if it passes. A draft costs
        the exit's layers. The first beyond a length also widens the verification, to the best one.

        round_D: seconds of a round of each length. verified_D: of its verification.
        """
        step = round_D[-1] - round_D[1] - (verified_D[-1] - verified_D[1])
        step = step / max(1, self.lengths[-1] - self.lengths[1])
        step = jnp.where(jnp.isfinite(step), jnp.maximum(step, 0), 0)
        ahead_TD = np.array(self.lengths) - np.arange(1 + self.lengths[-1])[:, None]
        fits_T = np.argmax(ahead_TD >= 0, axis=1)  # index of the length that holds these drafts
        wider_TD = round_D - round_D[fits_T, None]
        wider_TD = jnp.nan_to_num(wider_TD, nan=0, posinf=jnp.inf, neginf=0)
        tokens_BTD = expected_tokens(chance_B[:, None, None], np.maximum(ahead_TD, 1))
        further_BT = jnp.where(ahead_TD > 0, wider_TD / tokens_BTD, jnp.inf).min(-1)
        return jnp.maximum(further_BT, step)

    def proposed(
        self,
        model: Llama,
        state: DecodeState,
        settings: RoundSettings,
        proposal_BT: Int[Array, "B T"],
    ) -> Draft:
        """The draft of exit 0: looked-up tokens, whose distributions are points."""
        none, head = self.no_draft(model, state, settings), settings.head
        tokens_BT = jnp.pad(proposal_BT, ((0, 0), (0, 1)))
        limit_B, log_q_BTN = self.limit(state, settings), none.log_q_BTN
        if log_q_BTN is not None:
            index_BT, size = tokens_BT, log_q_BTN.shape[-1]
            if head is not None:  # tokens outside of the vocabulary end the draft
                index_BT = head.places_V[tokens_BT]
                known_BT = jnp.cumprod(index_BT < size, axis=1)
                limit_B = jnp.minimum(limit_B, known_BT.sum(1))
            is_token_BTN = index_BT[..., None] == jnp.arange(size)
            log_q_BTN = jnp.where(is_token_BTN, 0, -jnp.inf)
        count_B = jnp.where(state.running_B & (settings.exit_layer == 0), limit_B, 0)
        drafts_BT = jnp.concatenate([state.pending_B[:, None], proposal_BT], axis=1)
        hidden = (model.embed(drafts_BT), *none.hidden[1:])
        return Draft(state, hidden, tokens_BT, count_B, log_q_BTN, head, none.top_BT)

    def scores(
        self,
        model: Llama,
        draft: Draft,
        exit_layer: Int[Array, ""],
        due: Bool[Array, ""],
        hidden: tuple[Float[Array, "B T D"], ...],
        logits_BTV: Float[Array, "B T V"],
        new_BT: Int[Array, "B T"],
        accepted_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B E C"], Float[Array, "B E C"]]:
        """Counts of passed and tried drafts, if each exit had drafted the new tokens.

        A draft passes if its argmax is the token; in sampling with min(1, q / p) of exit and full
        model. `exit_layer`, which drafted, is always scored, also where it stopped; others if due.
        """
        state, head = draft.state, draft.head
        none = jnp.zeros_like(state.learned.passed_BEC)
        if not self.exits:
            return none, none
        table_ND, places_V = (None, None) if head is None else (head.table_ND, head.places_V)
        index_BT, steps = new_BT if head is None else places_V[new_BT], new_BT.shape[1]
        is_new_BT = jnp.arange(steps) <= accepted_B[:, None]
        if state.draws is not None:
            log_p_BT = of_tokens(state.draws.log_probs(logits_BTV), new_BT)

        def passed(log_q_BTN):
            # NaN: not in the vocabulary, or beyond the new tokens.
            log_q_BT = of_tokens(log_q_BTN, index_BT)
            return jnp.nan_to_num(jnp.exp(jnp.minimum(0, log_q_BT - log_p_BT)))

        def score(x_BTD):
            logits_BTN = model.unembed(x_BTD, table_ND)
            logits_BTN = state.penalised(logits_BTN, 0, new_BT, places_V)
            top_BT = top_probability(logits_BTN)
            if state.draws is None:
                return by_level(top_BT, is_new_BT, argmax(logits_BTN) == index_BT)
            return by_level(top_BT, is_new_BT, passed(state.draws.log_probs(logits_BTN)))

        def every():
            counts = [score(x_BTD) for x_BTD in hidden[1:]]
            return tuple(jnp.stack(each, axis=1) for each in zip(*counts, strict=True))

        top_BT = draft.top_BT[:, :steps]
        if state.draws is None:
            right_BT = draft.tokens_BT[:, :steps] == new_BT
        else:
            right_BT = passed(draft.log_q_BTN[:, :steps])
        own = by_level(top_BT, is_new_BT & (top_BT > 0), right_BT)
        is_own_E1 = (jnp.array(self.exits) == exit_layer)[:, None]
        others = lax.cond(due, every, lambda: (none, none))
        pairs = zip(own, others, strict=True)
        return tuple(jnp.where(is_own_E1, own_BC[:, None], each) for own_BC, each in pairs)
