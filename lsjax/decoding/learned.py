"""What the strategy auto learns while it decodes: which drafts pass."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.lookup import LONGEST
from lsjax.decoding.rounds import Verified, confidence_level

DECAY = 0.97  # weight of the older counts, for each new one
# Added to the counts: how many drafts of each kind, and what share of them usually passes.
LEVEL_COUNT, LEVEL_SHARES = 1.2, (0.2, 0.5, 0.7, 0.875, 0.975)
LOOKUP_COUNT, LOOKUP_SHARES = 2.0, (0.17, 0.3, 0.42, 0.5, 0.6, 0.64, 0.68, 0.72)
# If lookups of one size fail in a text, others fail too. The same holds for the levels of an exit.
# The usual shares weigh as much as this many drafts.
TEXT_COUNT = 4.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """Decayed counts of each row. E: exits. C: levels of their top probability. M: matching tokens
    of a lookup, 1 to LONGEST."""

    passed_BEC: Float[Array, "B E C"]
    tried_BEC: Float[Array, "B E C"]
    found_BM: Float[Array, "B M"]
    looked_BM: Float[Array, "B M"]
    rounds_B: Int[Array, " B"]

    @classmethod
    def create(cls, batch: int, exits: int) -> "Learned":
        """Nothing is known before the first round."""
        shapes = [(batch, exits, len(LEVEL_SHARES))] * 2 + [(batch, LONGEST)] * 2
        return cls(*map(jnp.zeros, shapes), jnp.zeros(batch, jnp.int32))

    @property
    def usual_BEC(self) -> Float[Array, "B E C"]:
        """Usual chances, adjusted to how often drafts of the exit failed in this text."""
        failing_C = 1 - jnp.array(LEVEL_SHARES)
        failed_BE1 = (self.tried_BEC - self.passed_BEC).sum(-1, keepdims=True)
        usual_BE1 = (self.tried_BEC * failing_C).sum(-1, keepdims=True)
        factor_BE1 = (failed_BE1 + TEXT_COUNT) / (usual_BE1 + TEXT_COUNT)
        return jnp.maximum(1 - factor_BE1 * failing_C, 0.02)

    @property
    def chances_BEC(self) -> Float[Array, "B E C"]:
        """Chance that a draft of each exit passes, by its top probability."""
        passed_BEC = self.passed_BEC + LEVEL_COUNT * self.usual_BEC
        return passed_BEC / (self.tried_BEC + LEVEL_COUNT)

    @property
    def chance_BE(self) -> Float[Array, "B E"]:
        """Chance that a draft of each exit passes."""
        passed_BE = (self.passed_BEC + LEVEL_COUNT * self.usual_BEC).sum(-1)
        tried_BE = (self.tried_BEC + LEVEL_COUNT).sum(-1)
        return jnp.minimum(passed_BE / tried_BE, 0.999)

    def lookup_tokens(
        self, matched_B: Int[Array, " B"], lengths: tuple[int, ...]
    ) -> Float[Array, "B D"]:
        """Expected tokens of a round with a lookup of each draft length."""
        usual_BM = self.looked_BM * jnp.array(LOOKUP_SHARES)
        found_B1, usual_B1 = self.found_BM.sum(-1, keepdims=True), usual_BM.sum(-1, keepdims=True)
        factor_B1 = (found_B1 + TEXT_COUNT) / (usual_B1 + TEXT_COUNT)
        expected_BM = jnp.minimum(factor_B1 * jnp.array(LOOKUP_SHARES), 0.98)
        found_BM = self.found_BM + LOOKUP_COUNT * expected_BM
        share_BM = found_BM / (self.looked_BM + LOOKUP_COUNT)
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
    ) -> "Learned":
        """The counts after a round. `verified.seen` has those of the exits."""
        accepted_B1, new_BT = verified.accepted_B[:, None], verified.tokens_BT
        is_new_BT = jnp.arange(new_BT.shape[1]) <= accepted_B1
        passed_BEC, tried_BEC = verified.seen
        kept_BE1 = DECAY ** tried_BEC.sum(-1, keepdims=True)

        # Right tokens of the lookup, and the first wrong one.
        right_BT = proposal_BT == new_BT[:, :-1]
        reached_BT = jnp.cumprod(jnp.pad(right_BT, ((0, 0), (1, 0)), constant_values=True), axis=1)
        looked_BT = (reached_BT[:, :-1] > 0) & is_new_BT[:, :-1] & (matched_B[:, None] > 0)
        size_BT = jnp.minimum(matched_B[:, None] + jnp.arange(right_BT.shape[1]), LONGEST)
        size_BTM = size_BT[..., None] == jnp.arange(1, LONGEST + 1)
        looked_BM = (size_BTM & looked_BT[..., None]).sum(1)
        found_BM = (size_BTM & (looked_BT & right_BT)[..., None]).sum(1)
        kept_BM = DECAY**looked_BM
        return Learned(
            self.passed_BEC * kept_BE1 + passed_BEC,
            self.tried_BEC * kept_BE1 + tried_BEC,
            self.found_BM * kept_BM + found_BM,
            self.looked_BM * kept_BM + looked_BM,
            self.rounds_B + 1,
        )


def by_level(
    top_BT: Float[Array, "B T"], tried_BT: Bool[Array, "B T"], passed_BT: Float[Array, "B T"]
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Counts of passed and of tried drafts, by their top probability."""
    level_BTC = confidence_level(top_BT)[..., None] == jnp.arange(len(LEVEL_SHARES))
    tried_BTC = (level_BTC & tried_BT[..., None]).astype(jnp.float32)
    return (tried_BTC * passed_BT[..., None]).sum(1), tried_BTC.sum(1)
