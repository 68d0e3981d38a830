"""The objective of a step: losses of the enabled exits, through one head.

Labelled positions are sorted first in each row. The row with most labels sets the chunk count. If a
mesh shards positions, each device's piece of a row counts as a row (`pieces`).

E: exits in the loss, with the last one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig
from lsjax.kernels.matmuls import in_order, splits_matrices
from lsjax.model.llama import Llama
from lsjax.model.matrices import cast_matrices, split_matrices
from lsjax.sharding import in_context_order, pieces
from lsjax.training.early_exit import ExitLoss, cross_entropy, exit_entries
from lsjax.training.forward import exit_states
from lsjax.training.head_loss import Entries, Head, Positions, head_loss
from lsjax.training.layer_dropout import draws
from lsjax.training.recipe import PAPER, Recipe


def objective(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    num_labels: Int[Array, ""],
    recipe: Recipe = PAPER,
) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Loss of some rows, and summed exit loss of each enabled exit (cross entropy for the last).

    Losses and gradients of parts of a batch add up to those of the complete batch. model: stacked,
    in the dtype of the parameters. rows_B: indices of these rows in the batch. num_labels: labelled
    tokens in the complete batch; the loss is divided by this number.
    """
    num_layers = model.config.num_layers
    run = config.early_exit, num_layers, step, config.num_steps
    layer_E, taken_E, weights_E = exit_entries(*run, recipe.exit_weights)
    narrow = cast_matrices(model, config.dtype)
    if splits_matrices():
        narrow = split_matrices(narrow)
    x_EBTD = exit_states(config, narrow, batch, step, rows_B, layer_E, recipe.drop_rates)

    x_EBTD, head = in_order(x_EBTD, Head(model.norm, model.head_table))
    entries = Entries(weights_E / jnp.maximum(num_labels, 1), layer_E + 1, jnp.asarray(step))
    positions = loss_positions(config, batch["labels_BT"], step, rows_B, layer_E, taken_E)
    x_EBTD, labels_BT = jax.vmap(pieces)(x_EBTD), pieces(in_context_order(batch["labels_BT"]))
    settings = recipe.loss_of_exits(config), config.z_loss, config.early_exit.token_share
    loss, sums_E = head_loss(*settings, head, x_EBTD, labels_BT, positions, entries)
    sums_L = jnp.zeros(num_layers, sums_E.dtype).at[layer_E].add(jnp.where(taken_E, sums_E, 0))
    return loss, sums_L


def loss_positions(
    config: StepConfig,
    labels_BT: Int[Array, "B T"],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    layer_E: Int[Array, " E"],
    taken_E: Bool[Array, " E"],
) -> Positions:
    """Positions in the loss, of the pieces of rows. The last exit uses all labelled positions.
    Other exits sample a `token_share` of each row, rounded up and reweighted."""
    labelled_BT = labels_BT >= 0
    count_B = labelled_BT.sum(1)
    num_entries, share = len(layer_E), config.early_exit.token_share
    chosen_EBT, scales_EB = labelled_BT[None], jnp.ones((num_entries, len(labels_BT)))
    if num_entries > 1 and share < 1:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key = jax.random.fold_in(key, 2**31 - 1)  # smaller values belong to layer dropout
        keys_E = jax.vmap(jax.random.fold_in, (None, 0))(key, layer_E[:-1])
        draws_EBT = draws(keys_E, rows_B, labels_BT.shape[1:])
        drawn_EBT = jnp.argsort(jnp.where(labelled_BT, draws_EBT, 2), axis=2)
        part_B = jnp.ceil(count_B * share).astype(count_B.dtype)
        drawn_EBT = jnp.argsort(drawn_EBT, axis=2) < part_B[:, None]
        chosen_EBT = jnp.concatenate([drawn_EBT, chosen_EBT])
        scales_EB = scales_EB.at[:-1].set(count_B / jnp.maximum(part_B, 1))
    chosen_EBT = jax.vmap(lambda x_BT: pieces(in_context_order(x_BT)))(chosen_EBT)
    shards = chosen_EBT.shape[1] // len(labels_BT)  # of the positions
    order_EBT = jnp.argsort(~chosen_EBT, axis=2, stable=True)
    order_EBT = jnp.broadcast_to(order_EBT, (num_entries, *order_EBT.shape[1:]))
    counts_EB = jnp.where(taken_E[:, None], chosen_EBT.sum(2), 0)
    return Positions(order_EBT, counts_EB, jnp.tile(scales_EB, (1, shards)))


def early_exit_loss(
    norm: Callable[[Array], Array],
    table_VD: Float[Array, "V D"],
    x_EBTD: Float[Array, "E B T D"],
    labels_BT: Int[Array, "B T"],
    weights_E: Float[Array, " E"],
    *,
    exit_loss: ExitLoss = cross_entropy,
    z_loss: float = 0.0,
    step: ArrayLike = 0,
) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """The weighted loss of several exits (LayerSkip, eq. 5), and the mean loss of each.

    For a loop of your own: x_EBTD holds the outputs of exits, the last one last, before the norm.
    Exits of weight 0 cost no time. The logits are made in chunks, with their gradients. Means are
    over the labels. Gradients flow to norm, table and x_EBTD, through the first result only.
    Ignored labels are negative.

    Args:
      norm: the final norm, a module or another tree of arrays that can be called.
      table_VD: the head, which all exits share.
      weights_E: such as `loss_weights` of the exits.
      exit_loss: of each exit but the last. Its `exit`, if it takes one, is the index in E, plus 1.
      z_loss: weight of log(Z)^2, added to the first result only.
      step: passed to `exit_loss`, if it takes one.
    """
    exits, rows_B = len(x_EBTD), jnp.arange(len(labels_BT))
    weights_E = jnp.asarray(weights_E)
    taken_E = (weights_E > 0).at[-1].set(True)
    positions = loss_positions(
        StepConfig(num_steps=1), labels_BT, jnp.asarray(step), rows_B, jnp.arange(exits), taken_E
    )
    count = jnp.maximum((labels_BT >= 0).sum(), 1)
    entries = Entries(weights_E / count, jnp.arange(1, exits + 1), jnp.asarray(step))
    head = Head(norm, table_VD)
    x_EBTD, labels_BT = jax.vmap(pieces)(x_EBTD), pieces(in_context_order(labels_BT))
    loss, sums_E = head_loss(exit_loss, z_loss, 1.0, head, x_EBTD, labels_BT, positions, entries)
    return loss, sums_E / count
