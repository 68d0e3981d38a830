"""Self-speculation that chooses its drafts: source and length are chosen anew in each round.

A round drafts with an exit, looks its drafts up in the text (lookup.py), or drafts nothing, which
is an autoregressive step. It takes the choice with the most expected tokens per second:

    expected tokens   from counts of what the full model accepted lately. An exit whose drafts pass
                      with probability a gives 1 + a + ... + a^d tokens. A lookup passes with a
                      probability that grows with the number of matching tokens.
    seconds           measured for each choice on this machine (calibration.py)

Exits that did not draft are scored too, in every fourth round or less often: a round computes their
hidden states anyway. Lookups are scored in every round. All of this is part of the compiled
loop. The choice depends only on earlier rounds, so that sampling stays exact.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.calibration import calibrated
from lsjax.decoding.draft import Draft, DraftHead, DraftVocabulary, of_tokens
from lsjax.decoding.lookup import LONGEST, look_up
from lsjax.decoding.rounds import Rounds, RoundSettings, Verified
from lsjax.decoding.sampling import argmax
from lsjax.decoding.state import DecodeState, Strategy, check_exit
from lsjax.model.llama import Llama

if TYPE_CHECKING:
    from lsjax.decoding.engine import Engine

LENGTHS = (0, 2, 6, 15)
# Rounds from one score of all exits to the next, at least, and the share of bytes for their heads.
SCORED_EVERY, SCORES_SHARE = 4, 0.01
# Weight of the older counts, for each new one.
EXIT_DECAY, LOOKUP_DECAY = 0.95, 0.97
# Counts before the first round: how many, and what share of them passed.
EXIT_COUNT, EXIT_SHARE = 4.0, 0.7
LOOKUP_COUNT, LOOKUP_SHARES = 2.0, (0.2, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """Decayed counts of each row. E: exits. M: matching tokens of a lookup, 1 to LONGEST."""

    passed_BE: Float[Array, "B E"]
    tried_BE: Float[Array, "B E"]
    found_BM: Float[Array, "B M"]
    looked_BM: Float[Array, "B M"]
    rounds_B: Int[Array, " B"]

    @classmethod
    def create(cls, batch: int, exits: int, before: "Learned | None" = None) -> "Learned":
        """Guesses before the first round. before: of one text; its share of passed drafts is kept.
        Its lookups are not: at their end, greedy texts often repeat themselves."""
        share_E = EXIT_SHARE if before is None else (before.passed_BE / before.tried_BE)[0]
        tried_BE = jnp.full((batch, exits), EXIT_COUNT)
        looked_BM = jnp.full((batch, LONGEST), LOOKUP_COUNT)
        found_BM = looked_BM * jnp.array(LOOKUP_SHARES)
        rounds_B = jnp.zeros(batch, jnp.int32)
        return cls(tried_BE * share_E, tried_BE, found_BM, looked_BM, rounds_B)

    def exit_tokens(self, length_D: Int[Array, " D"]) -> Float[Array, "B E D"]:
        """Expected tokens of a round with each exit and draft length."""
        share_BE1 = jnp.minimum(self.passed_BE / self.tried_BE, 0.999)[..., None]
        return (1 - share_BE1 ** (length_D + 1)) / (1 - share_BE1)

    def lookup_tokens(
        self, matched_B: Int[Array, " B"], lengths: tuple[int, ...]
    ) -> Float[Array, "B D"]:
        """Expected tokens of a round with a lookup of each draft length."""
        share_BM = self.found_BM / self.looked_BM
        place_BT = jnp.clip(matched_B[:, None] + jnp.arange(lengths[-1]), 1, LONGEST) - 1
        passes_BT = jnp.cumprod(jnp.take_along_axis(share_BM, place_BT, axis=1), axis=1)
        passes_BT = jnp.where(matched_B[:, None] > 0, passes_BT, 0)
        tokens_BT = 1 + jnp.pad(jnp.cumsum(passes_BT, axis=1), ((0, 0), (1, 0)))
        return tokens_BT[:, np.array(lengths)]

    def after(
        self,
        verified: Verified,
        own_E: Bool[Array, " E"],
        drafted_B: Int[Array, " B"],
        scored: Bool[Array, ""],
        matched_B: Int[Array, " B"],
        proposal_BT: Int[Array, "B T"],
    ) -> "Learned":
        """The counts after a round. own_E: the exit that drafted. scored: whether `verified` has
        scores of the others."""
        accepted_B1 = verified.accepted_B[:, None]
        new_BT = verified.tokens_BT
        is_new_BT = jnp.arange(new_BT.shape[1]) <= accepted_B1

        others_E = scored & ~own_E
        tried_BE = jnp.where(own_E, jnp.minimum(accepted_B1 + 1, drafted_B[:, None]), 0)
        passed_BE = jnp.where(own_E, accepted_B1, 0)
        scores_BE = (verified.scores_BTE * is_new_BT[..., None]).sum(1)
        tried_BE = jnp.where(others_E, accepted_B1 + 1, tried_BE)
        passed_BE = jnp.where(others_E, scores_BE, passed_BE)
        kept_BE = EXIT_DECAY**tried_BE

        # Right tokens of the lookup, and the first wrong one.
        right_BT = proposal_BT == new_BT[:, :-1]
        reached_BT = jnp.cumprod(jnp.pad(right_BT, ((0, 0), (1, 0)), constant_values=True), axis=1)
        looked_BT = (reached_BT[:, :-1] > 0) & is_new_BT[:, :-1] & (matched_B[:, None] > 0)
        size_BT = jnp.minimum(matched_B[:, None] + jnp.arange(right_BT.shape[1]), LONGEST)
        size_BTM = size_BT[..., None] == jnp.arange(1, LONGEST + 1)
        looked_BM = (size_BTM & looked_BT[..., None]).sum(1)
        found_BM = (size_BTM & (looked_BT & right_BT)[..., None]).sum(1)
        kept_BM = LOOKUP_DECAY**looked_BM
        return Learned(
            self.passed_BE * kept_BE + passed_BE,
            self.tried_BE * kept_BE + tried_BE,
            self.found_BM * kept_BM + found_BM,
            self.looked_BM * kept_BM + looked_BM,
            self.rounds_B + 1,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptiveSettings:
    """Arguments of a compiled round. seconds_SD: of a round with each source (lookup, then the
    exits) and draft length; infinite for choices that are never taken."""

    seconds_SD: Float[Array, "S D"]
    head: DraftHead | None


@dataclass(frozen=True)
class Adaptive(Strategy):
    """The same greedy tokens as Autoregressive, and the same distribution of sampled ones.

    exits: those that may draft; none for a model without LayerSkip. vocabulary: tokens that exits
    may draft, and lookups too if sampled. lengths: draft lengths, from 0. seconds:
    of a round with each source and length (`AdaptiveSettings`); an engine measures them by default.
    """

    name = "auto"
    exits: tuple[int, ...] = ()
    vocabulary: DraftVocabulary | None = None
    lengths: tuple[int, ...] = LENGTHS
    seconds: tuple[tuple[float, ...], ...] | None = None

    @property
    def rounds(self) -> Rounds:
        """Draft and verification. Exit 0 runs no layers."""
        return Rounds((0, *self.exits), self.lengths)

    @property
    def program(self) -> tuple:
        """Static settings that `step` reads. `arguments` carries the rest at run time."""
        return type(self), self.exits, self.lengths

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if a number is out of range or the vocabulary does not match."""
        for exit_layer in self.exits:
            check_exit(exit_layer, config.num_layers - 1)
        good = self.lengths[0] == 0 and self.lengths == tuple(sorted({*self.lengths}))
        check(good, f"lengths {self.lengths} must ascend from 0")
        if self.vocabulary is not None:
            self.vocabulary.validate(config)

    def arguments(self, model: Llama) -> AdaptiveSettings:
        """Seconds of each choice, and the rows of the head that exits draft with."""
        seconds_SD = np.ones((1 + len(self.exits), len(self.lengths)))  # while they are measured
        if self.seconds is not None:
            seconds_SD = np.array(self.seconds)
        head = None if self.vocabulary is None else self.vocabulary.head(model)
        return AdaptiveSettings(jnp.asarray(seconds_SD, jnp.float32), head)

    def prepared(self, engine: "Engine") -> "Adaptive":
        """With measured seconds (calibration.py), unless it has some."""
        return self if self.seconds is not None else calibrated(engine, self, engine.track)

    def scored_every(self, config: LlamaConfig) -> int:
        """Rounds from one score of all exits to the next."""
        share = (self.draft_vocab or config.vocab_size) / config.vocab_size
        heads = len(self.exits) * share * config.head_params
        whole = config.num_layers * config.layer_params + config.head_params
        return max(SCORED_EVERY, math.ceil(heads / (SCORES_SHARE * whole)))

    def first_guess(self, batch: int, before: Learned | None = None) -> Learned:
        """Counts before the first round."""
        return Learned.create(batch, len(self.exits), before)

    def step(self, model: Llama, state: DecodeState, arguments: AdaptiveSettings) -> DecodeState:
        """One round with the best source and length."""
        learned, head = state.learned, arguments.head
        matched_B, proposal_BT = look_up(state.tokens_BS, state.length_B, self.lengths[-1])
        exit_layer, length = self.choose(state, matched_B, arguments.seconds_SD)
        settings = RoundSettings(exit_layer, length, head, None)
        begun = self.proposed(model, state, settings, proposal_BT)
        draft = self.rounds.draft(model, state, settings, begun)
        due = learned.rounds_B.max() % self.scored_every(model.config) == 0
        look = partial(self.scores, model, state, head, due)
        done, verified = self.rounds.verify(model, draft, settings, look)
        own_E = jnp.array(self.exits, jnp.int32) == exit_layer
        after = learned.after(verified, own_E, draft.count_B, due, matched_B, proposal_BT)
        return replace(done, learned=after)

    def choose(
        self, state: DecodeState, matched_B: Int[Array, " B"], seconds_SD: Float[Array, "S D"]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Exit (0 for a lookup) and length with the most expected tokens per second."""
        learned, length_D = state.learned, jnp.array(self.lengths)
        lookup_BD = learned.lookup_tokens(matched_B, self.lengths)
        tokens_BSD = jnp.concatenate([lookup_BD[:, None], learned.exit_tokens(length_D)], axis=1)
        tokens_BSD = jnp.minimum(tokens_BSD, (state.end_B - state.length_B)[:, None, None])
        tokens_SD = jnp.where(state.running_B[:, None, None], tokens_BSD, 0).sum(0)
        best = argmax((tokens_SD / seconds_SD).reshape(-1))
        source, length = jnp.divmod(best, len(self.lengths))
        return jnp.array((0, *self.exits))[source], length_D[length]

    def proposed(
        self,
        model: Llama,
        state: DecodeState,
        settings: RoundSettings,
        proposal_BT: Int[Array, "B T"],
    ) -> Draft:
        """The draft of exit 0: looked-up tokens, whose distributions are points."""
        none, head = self.rounds.no_draft(model, state, settings.head), settings.head
        tokens_BT = jnp.pad(proposal_BT, ((0, 0), (0, 1)))
        limit_B = self.rounds.limit(state, settings)
        log_q_BTN = none.log_q_BTN
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
        return replace(
            none, hidden=hidden, tokens_BT=tokens_BT, count_B=count_B, log_q_BTN=log_q_BTN
        )

    def scores(self, model, state, head, due, hidden, logits_BTV, new_BT):
        """Probability [B, T, E] that a draft of each exit would have passed at the new tokens. If
        greedy, whether its argmax is the token; else min(1, q / p) of exit and full model."""
        if not self.exits:
            return jnp.zeros((*new_BT.shape, 0))
        table_ND, places_V = (None, None) if head is None else (head.table_ND, head.places_V)
        index_BT = new_BT if head is None else places_V[new_BT]

        def score(x_BTD):
            logits_BTN = model.unembed(x_BTD, table_ND)
            logits_BTN = state.penalised(logits_BTN, 0, new_BT, places_V)
            if state.draws is None:
                return (argmax(logits_BTN) == index_BT).astype(jnp.float32)
            log_q_BT = of_tokens(state.draws.log_probs(logits_BTN), index_BT)
            log_p_BT = of_tokens(state.draws.log_probs(logits_BTV), new_BT)
            # NaN: not in the vocabulary, or beyond the new tokens.
            return jnp.nan_to_num(jnp.exp(jnp.minimum(0, log_q_BT - log_p_BT)))

        none_BTE = jnp.zeros((*new_BT.shape, len(self.exits)))
        every = lambda: jnp.stack([score(x_BTD) for x_BTD in hidden[1:]], axis=-1)  # noqa: E731
        return lax.cond(due, every, lambda: none_BTE)
