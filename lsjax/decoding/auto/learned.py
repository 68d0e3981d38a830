"""What auto has learned of a text: which drafts pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.acceptance import Verified
from lsjax.decoding.auto.lookup import LONGEST
from lsjax.decoding.confidence import confidence_level

DECAY = 0.97  # weight of the older counts, for each new one
# Added to the counts: so many drafts of each kind, of which the usual share passes.
USUAL_COUNT = 2.0
# Added to the drafts of each level, for its share.
SHARE_COUNT = 0.5
# If drafts of an exit pass less often than usual at one level, they do so at all levels. So one
# factor, found / expected passes, scales the usual chances of all its levels. It begins at 1, with
# the weight of this many expected passes.
EXIT_COUNT = 8.0
LOOKUP_CHANCES = (0.17, 0.3, 0.42, 0.5, 0.6, 0.64, 0.68, 0.72)
# Drafts of the last text that a new one begins with. Exits are as good in both, often.
LESSON = 16.0
# Drafts that the agreement in training weighs as much as: a text may be easier or harder.
AGREEMENT_COUNT = 8.0
# Tokens that are made without a choice, after a choice to draft nothing: so many at first, then
# twice as many after each further one.
IDLE_TOKENS, MOST_IDLE_TOKENS = 4, 32
# Lookups of all sizes fail in the same texts. The usual shares weigh as much as this many drafts.
TEXT_COUNT = 4.0


# Usual chance that a draft passes, by level of the exit's top probability. Sampled drafts pass
# about as often as greedy ones.
USUAL_CHANCES = (0.25, 0.5, 0.75, 0.95, 0.99)
# After t passed drafts, the next one is rejected (t + 1)^-ease times as often as a first one. In
# sampling, block verification rejects later drafts of a round less often. 0.4 fits exits 1, 2 and 4
# of the quickstart.
EASE_GREEDY, EASE_SAMPLED = 0.0, 0.4


class Counts(NamedTuple):
    """Counts of passed and of tried drafts, by exit and level (Z) of the exit's top probability."""

    passed: Float[Array, "B *E Z"]
    tried: Float[Array, "B *E Z"]


def expected_counts(agreement: Sequence[float]) -> Counts:
    """Counts [E, Z] of exits with such shares of right drafts: AGREEMENT_COUNT drafts of each. The
    larger the share is, the more of them are at high levels."""
    tilt_T1 = np.linspace(-8, 8, 1_601)[:, None]
    share_TZ = np.exp(tilt_T1 * np.arange(len(USUAL_CHANCES)))
    share_TZ /= share_TZ.sum(-1, keepdims=True)
    right_T = share_TZ @ np.array(USUAL_CHANCES)
    nearest_E = np.array([np.argmin(np.abs(right_T - share)) for share in agreement])
    # Fewer than usual at the lowest level, if even that one promises too much.
    factor_E1 = np.minimum(1, np.array(agreement) / right_T[nearest_E])[:, None]
    tried_EZ = AGREEMENT_COUNT * share_TZ[nearest_E]
    return Counts(tried_EZ * USUAL_CHANCES * factor_E1, tried_EZ)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """Decayed counts of each row. E: exits. Z: levels of their top probability. M: matching tokens
    of a lookup, 1 to LONGEST."""

    passed_BEZ: Float[Array, "B E Z"]
    tried_BEZ: Float[Array, "B E Z"]
    lookup_passed_BM: Float[Array, "B M"]
    lookup_tried_BM: Float[Array, "B M"]
    rounds_B: Int[Array, " B"]
    idle_B: Int[Array, " B"]  # how many of the last choices were to draft nothing
    wait_B: Int[Array, " B"]  # tokens to be made before the next choice

    @classmethod
    def create(cls, batch: int, exits: int) -> "Learned":
        """Nothing is known before the first round."""
        return cls(
            passed_BEZ=jnp.zeros((batch, exits, len(USUAL_CHANCES))),
            tried_BEZ=jnp.zeros((batch, exits, len(USUAL_CHANCES))),
            lookup_passed_BM=jnp.zeros((batch, LONGEST)),
            lookup_tried_BM=jnp.zeros((batch, LONGEST)),
            rounds_B=jnp.zeros(batch, jnp.int32),
            idle_B=jnp.zeros(batch, jnp.int32),
            wait_B=jnp.zeros(batch, jnp.int32),
        )

    def lesson(self, row: int) -> Counts:
        """Counts of a row's exits, [E, Z], for the next texts: at most LESSON drafts of an exit."""
        passed_EZ, tried_EZ = np.asarray(self.passed_BEZ)[row], np.asarray(self.tried_BEZ)[row]
        share_E1 = np.minimum(1, LESSON / np.maximum(tried_EZ.sum(-1, keepdims=True), 1))
        return Counts(passed_EZ * share_E1, tried_EZ * share_E1)

    def with_lesson(self, lesson: Counts) -> "Learned":
        """Rows that begin with the counts of an earlier text, to which each adds a part."""
        shape = self.tried_BEZ.shape
        passed_BEZ, tried_BEZ = (
            jnp.array(np.broadcast_to(n_EZ / shape[0], shape)) for n_EZ in lesson
        )
        return replace(self, passed_BEZ=passed_BEZ, tried_BEZ=tried_BEZ)

    @property
    def level_share_EZ(self) -> Float[Array, "E Z"]:
        """Share of each level among the drafts of an exit."""
        tried_EZ = self.tried_BEZ.sum(0) + SHARE_COUNT
        return tried_EZ / tried_EZ.sum(-1, keepdims=True)

    @property
    def chances_EZ(self) -> Float[Array, "E Z"]:
        """Chance that a first draft of each exit passes, by its top probability. All rows count: in
        a batch, they draft together."""
        passed_EZ, tried_EZ = self.passed_BEZ.sum(0), self.tried_BEZ.sum(0)
        usual_Z = jnp.array(USUAL_CHANCES)
        found_E1, usual_E1 = (n.sum(-1, keepdims=True) for n in (passed_EZ, tried_EZ * usual_Z))
        factor_E1 = (found_E1 + EXIT_COUNT) / (usual_E1 + EXIT_COUNT)
        expected_EZ = jnp.minimum(factor_E1 * usual_Z, 0.99)
        return (passed_EZ + USUAL_COUNT * expected_EZ) / (tried_EZ + USUAL_COUNT)

    @property
    def mean_chance_E(self) -> Float[Array, " E"]:
        """Chance that a first draft of each exit passes."""
        return (self.level_share_EZ * self.chances_EZ).sum(-1)

    def exit_tokens(
        self,
        lengths: tuple[int, ...],
        least_EJ: Float[Array, "E J"],
        ease: float,
        rows: Int[Array, ""] | int = 1,
    ) -> tuple[Float[Array, "E J"], Float[Array, "E J"]]:
        """Expected tokens of a row in a round with each exit and draft length, and the chance that
        the exit drafts: if its rows' first tokens promise `least_EJ` accepted ones in the mean.

        rows: that draft together. The mean over them deviates less than a single row does.
        """
        mean_E = self.mean_chance_E
        first_EZ = mean_E[:, None] + (self.chances_EZ - mean_E[:, None]) / jnp.sqrt(rows)
        drafts_EJ = expected_drafts(mean_E, lengths, ease)[:, 0]
        passed_EJZ = first_EZ[:, None] * drafts_EJ[..., None]
        drafts_EJZ = jnp.where(passed_EJZ >= least_EJ[..., None], self.level_share_EZ[:, None], 0)
        return 1 + (drafts_EJZ * passed_EJZ).sum(-1), drafts_EJZ.sum(-1)

    def lookup_tokens(
        self, matched_B: Int[Array, " B"], lengths: tuple[int, ...]
    ) -> Float[Array, "B J"]:
        """Expected tokens of a round with a lookup of each draft length."""
        usual_BM = self.lookup_tried_BM * jnp.array(LOOKUP_CHANCES)
        found_B1, usual_B1 = (
            self.lookup_passed_BM.sum(-1, keepdims=True),
            usual_BM.sum(-1, keepdims=True),
        )
        factor_B1 = (found_B1 + TEXT_COUNT) / (usual_B1 + TEXT_COUNT)
        expected_BM = jnp.minimum(factor_B1 * jnp.array(LOOKUP_CHANCES), 0.98)
        lookup_passed_BM = self.lookup_passed_BM + USUAL_COUNT * expected_BM
        share_BM = lookup_passed_BM / (self.lookup_tried_BM + USUAL_COUNT)
        place_BT = jnp.clip(matched_B[:, None] + jnp.arange(lengths[-1]), 1, LONGEST) - 1
        passes_BT = jnp.cumprod(jnp.take_along_axis(share_BM, place_BT, axis=1), axis=1)
        passes_BT = jnp.where(matched_B[:, None] > 0, passes_BT, 0)
        tokens_BT = 1 + jnp.pad(jnp.cumsum(passes_BT, axis=1), ((0, 0), (1, 0)))
        return tokens_BT[:, np.array(lengths)]

    def after(
        self,
        verified: Verified,
        matched_B: Int[Array, " B"],
        proposal_BT: Int[Array, "B T"],
        is_idle: Bool[Array, ""],
    ) -> "Learned":
        """The counts after a round. `verified.seen` holds the `Counts` of its exits. proposal_BT:
        what the lookup found, by `matched_B` tokens. is_idle: whether the choice was to draft
        nothing."""
        new_BT, seen = verified.tokens_BT, verified.seen
        is_new_BT = jnp.arange(new_BT.shape[1]) <= verified.accepted_B[:, None]
        kept_BE1 = DECAY ** seen.tried.sum(-1, keepdims=True)

        # Right tokens of the lookup, and the first wrong one.
        right_BT = proposal_BT == new_BT[:, :-1]
        reached_BT = jnp.cumprod(jnp.pad(right_BT, ((0, 0), (1, 0)), constant_values=True), axis=1)
        looked_BT = (reached_BT[:, :-1] > 0) & is_new_BT[:, :-1] & (matched_B[:, None] > 0)
        size_BT = jnp.minimum(matched_B[:, None] + jnp.arange(right_BT.shape[1]), LONGEST)
        size_BTM = size_BT[..., None] == jnp.arange(1, LONGEST + 1)
        lookup_tried_BM = (size_BTM & looked_BT[..., None]).sum(1)
        lookup_passed_BM = (size_BTM & (looked_BT & right_BT)[..., None]).sum(1)
        kept_BM = DECAY**lookup_tried_BM
        idle_B = jnp.where(is_idle, self.idle_B + 1, 0)
        return Learned(
            self.passed_BEZ * kept_BE1 + seen.passed,
            self.tried_BEZ * kept_BE1 + seen.tried,
            self.lookup_passed_BM * kept_BM + lookup_passed_BM,
            self.lookup_tried_BM * kept_BM + lookup_tried_BM,
            self.rounds_B + 1,
            idle_B,
            idle_tokens(idle_B),
        )


def idle_tokens(choices_B: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens without a choice, after so many choices in a row to draft nothing."""
    doubled_B = IDLE_TOKENS << jnp.clip(choices_B - 1, 0, 16)
    return jnp.where(choices_B > 0, jnp.minimum(doubled_B, MOST_IDLE_TOKENS), 0)


def in_turn(first: Float[Array, "*b"], number: int, ease: float) -> Float[Array, "*b T"]:
    """Chances that each of so many drafts passes, if those before it have. first: of the first."""
    return 1 - (1 - first[..., None]) * (1.0 + np.arange(number)) ** -ease


def expected_drafts(
    first: Float[Array, "*b"], lengths: tuple[int, ...], ease: float
) -> Float[Array, "*b T J"]:
    """Drafts that are expected to pass from draft t on, for each length, if draft t does: 1 for it,
    and the chances of the later ones. 0 if the length ends before it."""
    index_T = np.arange(1 + lengths[-1])
    # Logarithm of the chance that drafts 1 to t pass.
    later_TT = (index_T > 0) & (index_T <= index_T[:, None])
    chance_T = in_turn(first, len(index_T), ease)
    log_T = jnp.where(later_TT, jnp.log(chance_T)[..., None, :], 0).sum(-1)
    passes_TT = jnp.exp(log_T[..., None, :] - log_T[..., None])
    counts_TJT = (index_T >= index_T[:, None, None]) & (index_T < np.array(lengths)[:, None])
    return jnp.where(counts_TJT, passes_TT[..., None, :], 0).sum(-1)


def by_level(
    top_BT: Float[Array, "B T"], tried_BT: Bool[Array, "B T"], passed_BT: Float[Array, "B T"]
) -> Counts:
    """Counts of an exit's drafts, [B, Z], by their top probability."""
    level_BTZ = confidence_level(top_BT)[..., None] == jnp.arange(len(USUAL_CHANCES))
    tried_BTZ = (level_BTZ & tried_BT[..., None]).astype(jnp.float32)
    return Counts((tried_BTZ * passed_BT[..., None]).sum(1), tried_BTZ.sum(1))
