"""When a draft ends early: where the exit is unsure."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LEVELS = (0.4, 0.6, 0.8, 0.95)  # of an exit's top probability


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Confidence:
    """Each row drafts while the product of the exit's top probabilities is `least` at least."""

    least: Float[Array, ""]

    def go_on(
        self, active_B: Bool[Array, " B"], sure_B: Float[Array, " B"], at: Int[Array, ""]
    ) -> Bool[Array, " B"]:
        """Those of the active rows whose products are large enough for draft number `at`."""
        return active_B & (sure_B >= self.least)

    def chance(self, top_B1: Float[Array, "B 1"], at: Int[Array, ""]) -> Float[Array, " B"]:
        """Chance that draft number `at` passes, by the exit's top probability."""
        return top_B1[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Together:
    """All rows draft while the sum of their chances that all drafts pass is `least_T` at least. For
    a batch, a draft takes as long in one row as in all.

    chances_ZT: that a draft passes, by level of the exit's top probability and the draft's number.
    weight_B: of the rows in the sum.
    """

    least_T: Float[Array, " T"]
    chances_ZT: Float[Array, "Z T"]
    weight_B: Float[Array, " B"]

    def go_on(
        self, active_B: Bool[Array, " B"], sure_B: Float[Array, " B"], at: Int[Array, ""]
    ) -> Bool[Array, " B"]:
        """The active rows, if draft number `at` pays."""
        return active_B & ((self.weight_B * sure_B).sum(where=active_B) >= self.least_T[at])

    def chance(self, top_B1: Float[Array, "B 1"], at: Int[Array, ""]) -> Float[Array, " B"]:
        """Chance that draft number `at` passes, by the exit's top probability."""
        return self.chances_ZT[confidence_level(top_B1[:, 0]), at]


def confidence_level(top: Float[Array, "..."]) -> Int[Array, "..."]:
    """Level of a top probability: 0 below the first of LEVELS, 1 from there on, and so on."""
    return (top[..., None] >= jnp.array(LEVELS)).sum(-1)
