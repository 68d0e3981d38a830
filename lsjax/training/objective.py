"""What a step makes smaller: the weighted losses of the exits that the curriculum turns on."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig
from lsjax.model.llama import Llama, cast_matrices
from lsjax.model.split import split_matrices
from lsjax.sharding import platform
from lsjax.training.early_exit import EXIT_LOSSES, ExitLoss, enabled_exits, loss_weights, most_exits
from lsjax.training.forward import exit_states
from lsjax.training.layer_dropout import DropRates, drop_rates
from lsjax.training.loss import Positions, head_loss, head_of


def objective(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    num_labels: Int[Array, ""],
    *,
    exit_loss: ExitLoss | None = None,
    drop_rates: DropRates = drop_rates,
) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Loss of some rows of a step's batch, and the summed cross entropy of each exit that is on.

    model: stacked, in the dtype of the parameters. rows_B: numbers of these rows in the batch.
    num_labels: labelled tokens in all of the batch, by which the loss is divided: so the losses and
    gradients of parts of a batch add up to those of the whole. exit_loss: of the exits below the
    last one; that of the config's target by default. drop_rates: of layer dropout, where it is on.
    """
    shape = model.config
    enabled_L = enabled_exits(config.early_exit, shape.num_layers, step, config.num_steps)
    weights_L = loss_weights(config.early_exit, shape.num_layers, step, config.num_steps)
    most = most_exits(config.early_exit, shape.num_layers, config.num_steps)
    exit_S, taken_S = slots(enabled_L, most)
    narrow = cast_matrices(model, config.dtype)
    if platform() == "tpu":
        narrow = split_matrices(narrow)
    x_SBTD = exit_states(config, narrow, batch, step, rows_B, exit_S, drop_rates)

    head = head_of(model)
    if platform() == "gpu":
        # XLA:GPU would gather the table, and allocate its gradient, before the layers run.
        head, x_SBTD = lax.optimization_barrier((head, x_SBTD))
    weights_S = jnp.where(taken_S, weights_L[exit_S], 0) / jnp.maximum(num_labels, 1)
    positions = loss_positions(config, batch["labels_BT"], step, rows_B, exit_S, taken_S)
    loss, sums_S = head_loss(
        exit_loss or EXIT_LOSSES[config.early_exit.target],
        config.z_loss,
        head,
        x_SBTD,
        batch["labels_BT"],
        positions,
        weights_S,
    )
    sums_L = jnp.zeros(shape.num_layers, sums_S.dtype).at[exit_S].add(jnp.where(taken_S, sums_S, 0))
    return loss, sums_L


def slots(enabled_L: Bool[Array, " L"], most: int) -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
    """Layers of the exits that have a slot, the last one in the last slot, and whether the exit is
    on.

    most: exits beside the last one that are on in any step. Their slots are taken in order; where
    nearly all exits are on in some step, each has a slot of its own, which costs the scan less.
    """
    last = len(enabled_L) - 1
    if last and most + 1 >= last:
        return jnp.arange(last + 1), jnp.append(enabled_L[:-1], True)
    (exit_S,) = jnp.nonzero(enabled_L[:-1], size=most, fill_value=last)
    return jnp.append(exit_S, last), jnp.append(exit_S < last, True)


def loss_positions(
    config: StepConfig,
    labels_BT: Int[Array, "B T"],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    exit_S: Int[Array, " S"],
    taken_S: Bool[Array, " S"],
) -> Positions:
    """Labelled positions, all of them for the last slot, and for the others their share of each
    row: rounded up, drawn for each step, exit and row, and each counting for more accordingly."""
    labelled_BT = labels_BT >= 0
    count_B = labelled_BT.sum(1)
    order_BT = jnp.argsort(~labelled_BT, axis=1, stable=True)
    slots, share = len(exit_S), config.early_exit.token_share
    counts_SB = jnp.where(taken_S[:, None], count_B, 0)
    scales_SB = jnp.ones(counts_SB.shape)
    order_SBT = jnp.broadcast_to(order_BT, (slots, *order_BT.shape))
    if slots > 1 and share < 1:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key = jax.random.fold_in(key, 2**31 - 1)  # the layers below have layer dropout

        def draw(exit, row):
            row_key = jax.random.fold_in(jax.random.fold_in(key, exit), row)
            return jax.random.uniform(row_key, labels_BT.shape[1:])

        draws_SBT = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(exit_S[:-1], rows_B)
        drawn_SBT = jnp.argsort(jnp.where(labelled_BT, draws_SBT, 2), axis=2)
        order_SBT = jnp.concatenate([drawn_SBT, order_BT[None]])
        part_B = jnp.ceil(count_B * share).astype(count_B.dtype)
        counts_SB = counts_SB.at[:-1].set(jnp.where(taken_S[:-1, None], part_B, 0))
        scales_SB = scales_SB.at[:-1].set(count_B / jnp.maximum(part_B, 1))
    return Positions(order_SBT, counts_SB, scales_SB)
