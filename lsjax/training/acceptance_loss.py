"""What exit blocks learn: to say what the last exit says. Losses of positions and their gradients.

p is the last exit's distribution, and q the block's. Each gradient is written down here: it is then
computed with its loss, in few passes over the logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.config import StepConfig
from lsjax.training.early_exit import ExitLoss, log_z, with_exit

LEAST = 1e-30  # accepted share, so that its inverse is finite


class Distribution(NamedTuple):
    """A distribution over tokens, as logits and the log of their denominator."""

    logits_BCV: Float[Array, "B C V"]
    log_z_BC: Float[Array, "B C"]

    @classmethod
    def of(cls, logits_BCV: Float[Array, "B C V"]) -> "Distribution":
        """That of these logits."""
        return cls(logits_BCV, log_z(logits_BCV))

    @property
    def logs_BCV(self) -> Float[Array, "B C V"]:
        """Log-probabilities. They are not in memory: what reads them computes them."""
        return self.logits_BCV - self.log_z_BC[..., None]


class LossAndGradient(NamedTuple):
    """The loss of each position, and its gradient by the block's logits."""

    loss_BC: Float[Array, "B C"]
    gradient_BCV: Float[Array, "B C V"]


# (q, p, labels, exit, step) -> losses and gradients
BlockLoss = Callable[..., LossAndGradient]


def acceptance_loss(config: StepConfig) -> BlockLoss:
    """KL(p || q), and from `exit_blocks.acceptance_from` on -log sum min(p, q): the log of the
    chance that a sampled draft is accepted."""
    first = config.exit_blocks.acceptance_from * config.num_steps

    def loss(q, p, label_BC, exit, step):
        return lax.cond(step < first, of_divergence, of_rejection, q, p)

    return loss


def of_divergence(q: Distribution, p: Distribution) -> LossAndGradient:
    """KL(p || q). Its gradient is q - p."""
    p_BCV = jnp.exp(p.logs_BCV)
    loss_BC = (p_BCV * (p.logs_BCV - q.logs_BCV)).sum(-1)
    return LossAndGradient(loss_BC, jnp.exp(q.logs_BCV) - p_BCV)


def of_rejection(q: Distribution, p: Distribution) -> LossAndGradient:
    """-log of the accepted share a = sum min(p, q), at most -log LEAST.

    Only tokens with q < p change a. If s is the sum of their q, the gradient is q s / a, less q / a
    at these tokens.
    """
    q_BCV, p_BCV = jnp.exp(q.logs_BCV), jnp.exp(p.logs_BCV)
    limits_BCV = q_BCV < p_BCV
    accepted_BC = jnp.maximum(jnp.minimum(p_BCV, q_BCV).sum(-1), LEAST)
    share_BC = jnp.where(limits_BCV, q_BCV, 0).sum(-1) / accepted_BC
    at_limits_BC = share_BC - 1 / accepted_BC
    factor_BCV = jnp.where(limits_BCV, at_limits_BC[..., None], share_BC[..., None])
    return LossAndGradient(-jnp.log(accepted_BC), q_BCV * factor_BCV)


def of_exit_loss(exit_loss: ExitLoss) -> BlockLoss:
    """A loss of one's own, with its gradient by autodiff."""

    def loss(
        q: Distribution,
        p: Distribution,
        label_BC: Int[Array, "B C"],
        exit: Int[Array, ""],
        step: Int[Array, ""],
    ) -> LossAndGradient:
        own = with_exit(exit_loss, exit, step)
        loss_BC, backward = jax.vjp(lambda x: own(x, label_BC, p.logits_BCV), q.logits_BCV)
        return LossAndGradient(loss_BC, *backward(jnp.ones_like(loss_BC)))

    return loss
