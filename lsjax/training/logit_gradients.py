"""Loss of a chunk of positions, and its gradient with respect to their logits.

The gradient is a product: a factor of each position, times an array of the logits' shape. The
matmuls that follow read the array in the dtype of the computation. The factors scale the states
beside it, which are smaller.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import check
from lsjax.kernels.matmuls import computed_once
from lsjax.training.early_exit import ExitLoss, log_z


class Losses(NamedTuple):
    """Sums of losses: as the objective has them, weighted and with z_loss, and as metrics do."""

    objective: Float[Array, ""]
    metric: Float[Array, "*E"]


class LossAndGradient(NamedTuple):
    """Losses of a chunk, and its gradient: the factors, if they are not 1, times the array."""

    losses: Losses
    factor_BC: Float[Array, "B C"] | None
    array_BCV: Float[Array, "B C V"]


def of_cross_entropy(
    logits_BCV: Float[Array, "B C V"],
    label_BC: Int[Array, "B C"],
    scale_BC: Float[Array, "B C"],
    weight: Float[Array, ""],
    dtype: DTypeLike,
) -> LossAndGradient:
    """The cross entropy, and its gradient. Reads the logits once after their maximum is known.

    The gradient is the softmax, less 1 at the label. The array holds the softmax's numerators. At
    the label it holds the numerator less the sum. The factors divide by the sum.
    """
    top_BC = logits_BCV.max(-1)
    weights_BCV = jnp.exp(logits_BCV - top_BC[:, :, None])
    total_BC = weights_BCV.sum(-1)
    is_label_BCV = jnp.arange(logits_BCV.shape[-1]) == label_BC[:, :, None]
    chosen_BC = jnp.where(is_label_BCV, logits_BCV, 0).sum(-1)
    loss = (scale_BC * (top_BC + jnp.log(total_BC) - chosen_BC)).sum()
    at_label_BC = jnp.exp(chosen_BC - top_BC) - total_BC
    weights_BCV, at_label_BC = computed_once((weights_BCV.astype(dtype), at_label_BC.astype(dtype)))
    array_BCV = jnp.where(is_label_BCV, at_label_BC[:, :, None], weights_BCV)
    return LossAndGradient(Losses(weight * loss, loss), weight * scale_BC / total_BC, array_BCV)


def of_any_loss(
    loss: Callable[..., tuple[Array, Array]],
    logits_BCV: Float[Array, "B C V"],
    label_BC: Int[Array, "B C"],
    scale_BC: Float[Array, "B C"],
    weight: Float[Array, ""],
    dtype: DTypeLike,
) -> LossAndGradient:
    """Any loss, such as a `chunk_loss`, and its gradient by autodiff."""
    differentiated = jax.value_and_grad(loss, has_aux=True)
    losses, array_BCV = differentiated(logits_BCV, label_BC, scale_BC, weight)
    return LossAndGradient(Losses(*losses), None, computed_once(array_BCV.astype(dtype)))


def chunk_loss(
    exit_loss: ExitLoss,
    z_loss: float,
    final_BCV: Float[Array, "B C V"],
    logits_BCV: Float[Array, "B C V"],
    label_BC: Int[Array, "B C"],
    scale_BC: Float[Array, "B C"],
    weight: Float[Array, ""],
) -> tuple[Array, Array]:
    """`Losses` of the chunk, as a loss and something beside it."""
    losses = exit_loss(logits_BCV, label_BC, final_BCV)
    check(
        jnp.shape(losses) == label_BC.shape,
        f"exit_loss returned the shape {list(jnp.shape(losses))} for labels of the shape "
        f"{list(label_BC.shape)}: return the loss of each token",
    )
    total = added = (scale_BC * losses).sum()
    if z_loss:
        total += z_loss * (scale_BC * jnp.square(log_z(logits_BCV))).sum()
    return weight * total, added


def scaled(xs: Any, factor_BC: Float[Array, "B C"] | None, dtype: DTypeLike) -> Any:
    """Arrays [B, C, D] times the factors, in `dtype`."""
    if factor_BC is not None:
        xs = jax.tree.map(lambda x_BCD: x_BCD * factor_BC[:, :, None], xs)
    return jax.tree.map(lambda x_BCD: x_BCD.astype(dtype), xs)
