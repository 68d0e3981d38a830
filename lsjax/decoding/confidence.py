"""When a draft ends early: where the exit is unsure."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LEVELS = (0.4, 0.6, 0.8, 0.95)  # of an exit's top probability


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Confidence:
    """Minimum product of the drafts' chances to pass, for each draft; one row may serve all. A
    chance is the exit's top probability, or chances_BZT at its level and the draft's number."""

    least_BT: Float[Array, "#B T"]
    chances_BZT: Float[Array, "B Z T"] | None = None

    @classmethod
    def constant(cls, least: float | None, columns: int) -> "Confidence | None":
        """The same minimum for all drafts, of top probabilities; None for no minimum."""
        return None if least is None else cls(jnp.full((1, columns), least, jnp.float32))

    def suffices(self, sure_B: Float[Array, " B"], at: Int[Array, ""]) -> Bool[Array, " B"]:
        """Whether a product is enough for draft number `at`."""
        return sure_B >= self.least_BT[:, at]

    def chance(self, top_B1: Float[Array, "B 1"], at: Int[Array, ""]) -> Float[Array, " B"]:
        """Chance that draft number `at` passes, by the exit's top probability."""
        if self.chances_BZT is not None:
            chances_BZ = self.chances_BZT[:, :, at]
            top_B1 = jnp.take_along_axis(chances_BZ, confidence_level(top_B1), axis=1)
        return top_B1[:, 0]


def confidence_level(top: Float[Array, "..."]) -> Int[Array, "..."]:
    """Level of a top probability: 0 below the first of LEVELS, 1 from there on, and so on."""
    return (top[..., None] >= jnp.array(LEVELS)).sum(-1)
