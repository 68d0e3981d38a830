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


class LastExit(NamedTuple):
    """p, as logits and the log of their denominator."""

    logits_BCV: Float[Array, "B C V"]
    log_z_BC: Float[Array, "B C"]


class LossAndGradient(NamedTuple):
    """The loss of each position, and its gradient by the block's logits."""

    loss_BC: Float[Array, "B C"]
    gradient_BCV: Float[Array, "B C V"]


# (the block's logits, labels, p, exit and step) -> losses and gradients
BlockLoss = Callable[..., LossAndGradient]


def acceptance_loss(config: StepConfig) -> BlockLoss:
    """KL(p || q), and from `exit_blocks.acceptance_from` on -log sum min(p, q): the log of the
    chance that a sampled draft is accepted."""
    first = config.exit_blocks.acceptance_from * config.num_steps

    def loss(logits_BCV, label_BC, last, exit, step):
        return lax.cond(step < first, of_divergence, of_rejection, logits_BCV, last)

    return loss


def of_divergence(logits_BCV: Float[Array, "B C V"], last: LastExit) -> LossAndGradient:
    """KL(p || q). Its gradient is q - p."""
    log_p_BCV, log_q_BCV = _logs(logits_BCV, last)
    p_BCV = jnp.exp(log_p_BCV)
    loss_BC = (p_BCV * (log_p_BCV - log_q_BCV)).sum(-1)
    return LossAndGradient(loss_BC, jnp.exp(log_q_BCV) - p_BCV)


def of_rejection(logits_BCV: Float[Array, "B C V"], last: LastExit) -> LossAndGradient:
    """-log of the accepted share a = sum min(p, q).

    Only tokens with q < p change a. If s is the sum of their q / a, the gradient is q s, less q / a
    at these tokens.
    """
    log_p_BCV, log_q_BCV = _logs(logits_BCV, last)
    log_a_BC = log_z(jnp.minimum(log_p_BCV, log_q_BCV))
    limits_BCV = log_q_BCV < log_p_BCV
    share_BCV = jnp.where(limits_BCV, jnp.exp(log_q_BCV - log_a_BC[..., None]), 0)
    share_BC1 = share_BCV.sum(-1, keepdims=True)
    return LossAndGradient(-log_a_BC, jnp.exp(log_q_BCV) * share_BC1 - share_BCV)


def _logs(
    logits_BCV: Float[Array, "B C V"], last: LastExit
) -> tuple[Float[Array, "B C V"], Float[Array, "B C V"]]:
    """log p and log q."""
    log_p_BCV = last.logits_BCV - last.log_z_BC[..., None]
    return log_p_BCV, logits_BCV - log_z(logits_BCV)[..., None]


def of_exit_loss(exit_loss: ExitLoss) -> BlockLoss:
    """A loss of one's own, with its gradient by autodiff."""

    def loss(
        logits_BCV: Float[Array, "B C V"],
        label_BC: Int[Array, "B C"],
        last: LastExit,
        exit: Int[Array, ""],
        step: Int[Array, ""],
    ) -> LossAndGradient:
        own = with_exit(exit_loss, exit, step)
        loss_BC, backward = jax.vjp(lambda x: own(x, label_BC, last.logits_BCV), logits_BCV)
        return LossAndGradient(loss_BC, *backward(jnp.ones_like(loss_BC)))

    return loss
