"""The loss of exit blocks (lsjax/model/exit_blocks.py): how far they are from the last exit.

The model is frozen. One forward pass gives the states after the exits and after the last layer, and
nothing flows back through it. Batches may bring both instead (kept_states.py). Labelled positions
pass through the head in chunks. A chunk computes the last exit's logits once. For each block it
computes logits, loss and the gradient of the states. The head gets no gradient. With a draft
vocabulary it has the rows of these tokens alone, and both distributions are those over them.

E: exit blocks. W: tokens of the draft vocabulary, or V.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.config import LayerDropoutConfig, StepConfig
from lsjax.kernels.loss_chunks import loss_chunk
from lsjax.kernels.rope import for_training
from lsjax.model.exit_blocks import block_exits
from lsjax.model.llama import Llama, stacked
from lsjax.model.matrices import cast_matrices
from lsjax.model.rope import rope_angles
from lsjax.sharding import PIECES, in_context_order, on_each_device, over_context, pieces
from lsjax.training.acceptance_loss import (
    BlockLoss,
    Distribution,
    acceptance_loss,
    of_exit_loss,
)
from lsjax.training.early_exit import ExitLoss
from lsjax.training.forward import exit_states
from lsjax.training.head_loss import CHUNKS, Head
from lsjax.training.layer_dropout import drop_rates

IMPOSSIBLE = -1e4  # a logit whose probability is 0, without infinities in gradients


class LikelyTokens(NamedTuple):
    """The last exit's K most probable tokens. All others count as impossible."""

    ids_BTK: Int[Array, "B T K"]  # below W
    log_probs_BTK: Float[Array, "B T K"]

    def logits(self, width: int) -> Float[Array, "B T W"]:
        """Their log-probabilities among those of all tokens."""
        places = jnp.indices(self.ids_BTK.shape, sparse=True)[:2]
        none = jnp.full((*self.ids_BTK.shape[:2], width), IMPOSSIBLE, self.log_probs_BTK.dtype)
        return none.at[*places, self.ids_BTK].set(self.log_probs_BTK, unique_indices=True)


def block_objective(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    num_labels: Int[Array, ""],
    exit_loss: ExitLoss | None = None,
    draft_ids_W: Int[Array, " W"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Mean loss of the blocks over some rows, and the summed loss of each exit with a block.

    batch: may have the arrays of kept_states.py. draft_ids_W: tokens that the blocks may draft; all
    by default. Other arguments as of `objective`.
    """
    model = cast_matrices(model, config.dtype)
    if "exit_states_BETD" in batch:
        before_EBTD = jnp.moveaxis(batch["exit_states_BETD"], 1, 0)
        final = LikelyTokens(batch["likely_ids_BTK"], batch["likely_log_probs_BTK"])
    else:
        *before, final_BTD = frozen_states(config, model, batch)
        before_EBTD, final = jnp.stack(before), pieces(final_BTD)
    x_EBTD = jax.vmap(pieces)(block_states(config, model, before_EBTD, batch))
    labels_BT = pieces(in_context_order(drafted_labels(batch["labels_BT"], draft_ids_W)))
    head = drafting_head(model, draft_ids_W)
    exits = block_exits(model)
    given = x_EBTD, final, labels_BT, jnp.array(exits), step
    own = acceptance_loss(config) if exit_loss is None else of_exit_loss(exit_loss)
    loss, sums_E = block_losses(own, head, *given)
    scale = 1 / (len(exits) * jnp.maximum(num_labels, 1))
    sums_L = jnp.zeros(model.config.num_layers, sums_E.dtype)
    return loss * scale, sums_L.at[jnp.array(exits) - 1].set(sums_E)


def drafting_head(model: Llama, draft_ids_W: Int[Array, " W"] | None) -> Head:
    """The model's head, with the rows of these tokens alone. It gets no gradient."""
    head = lax.stop_gradient(Head(model.norm, model.head_table))
    return head if draft_ids_W is None else head._replace(table_VD=head.table_VD[draft_ids_W])


def drafted_labels(
    labels_BT: Int[Array, "B T"], draft_ids_W: Int[Array, " W"] | None
) -> Int[Array, "B T"]:
    """The labels as indices in the draft vocabulary, and -1 for tokens that are not in it."""
    if draft_ids_W is None:
        return labels_BT
    places_BT = jnp.searchsorted(draft_ids_W, labels_BT).clip(max=len(draft_ids_W) - 1)
    return jnp.where(draft_ids_W[places_BT] == labels_BT, places_BT, -1)


def frozen_states(
    config: StepConfig, model: Llama, batch: dict[str, Array]
) -> Float[Array, "E1 B T D"]:
    """The states after each exit with a block, and after the last layer. No gradient flows back.
    model: in the computation's dtype."""
    layer_E = jnp.array([*block_exits(model), model.config.num_layers]) - 1
    frozen, rows_B = replace(config, layer_dropout=LayerDropoutConfig()), jnp.zeros(0, jnp.int32)
    given = batch, jnp.int32(0), rows_B, layer_E, drop_rates
    return lax.stop_gradient(exit_states(frozen, stacked(model), *given))


def block_states(
    config: StepConfig, model: Llama, before_EBTD: Float[Array, "E B T D"], batch: dict[str, Array]
) -> Float[Array, "E B T D"]:
    """What each exit block makes of the states after its exit. model: in the computation's
    dtype."""
    batch = over_context(batch)
    ropes = for_training(rope_angles(batch["positions_BT"], model.config, before_EBTD.dtype))
    after = []
    for exit_layer, x_BTD in zip(block_exits(model), before_EBTD, strict=True):
        rope, window = model.config.layer_kind(exit_layer)
        given = ropes[rope], batch["segments_BT"], config.attention
        after.append(model.exit_blocks[f"{exit_layer}"](x_BTD, *given, window=window))
    return jnp.stack(after)


class Sums(NamedTuple):
    """The loss of each block, as sums over positions, and the gradients of the blocks' states."""

    each_E: Float[Array, " E"]
    dx_EBTD: Float[Array, "E B T D"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_losses(
    block_loss: BlockLoss,
    head: Head,
    x_EBTD: Float[Array, "E B T D"],
    final: Float[Array, "B T D"] | LikelyTokens,
    labels_BT: Int[Array, "B T"],
    exit_E: Int[Array, " E"],
    step: Int[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """Sum of the losses of all blocks, whose gradient flows to x_EBTD; and the sum of each. final:
    the states after the last layer, or what the last exit says. Labels below 0 are left out."""
    return _forward(block_loss, head, x_EBTD, final, labels_BT, exit_E, step)[0]


@jax.named_scope("head")
def _forward(block_loss, head, x_EBTD, final, labels_BT, exit_E, step):
    narrow = Head(head.norm, head.table_VD.astype(x_EBTD.dtype))
    counts_B = (labels_BT >= 0).sum(1)
    chunk = loss_chunk(*labels_BT.shape, head.table_VD.shape)
    chunks = -(-counts_B.max() // chunk)
    function = partial(_own_rows, block_loss, chunk)
    arrays = narrow, x_EBTD, final, labels_BT, exit_E, step, chunks
    rows, entries = P(PIECES), P(None, PIECES)
    specs, outputs = (P(), entries, rows, rows, P(), P(), P()), (rows, entries)
    each_PE, dx_EBTD = on_each_device(function, arrays, specs, outputs, axes=PIECES)
    each_E = each_PE.sum(0)
    return (each_E.sum(), each_E), dx_EBTD


def _own_rows(block_loss, chunk, head, x_EBTD, final, labels_BT, exit_E, step, chunks):
    """Losses and gradients of a device's rows. Sums have a leading axis of size 1."""
    wide = jnp.promote_types(x_EBTD.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=wide)
    table_DV, steps = head.table_VD.T, labels_BT.shape[1]
    order_BT = jnp.argsort(labels_BT < 0, axis=1, stable=True)
    back_BT = jnp.argsort(order_BT, axis=1)
    whole = -(-steps // chunk) * chunk
    padded_BT = jnp.pad(order_BT, [(0, 0), (0, whole - steps)])
    counts_B1 = (labels_BT >= 0).sum(1)[:, None]

    def logits(normed_BCD):
        return product("BCD,DV->BCV", normed_BCD, table_DV)

    def add_chunk(index, sums):
        start = index * chunk
        at_BC = lax.dynamic_slice_in_dim(padded_BT, start, chunk, 1)
        counted_BC = start + jnp.arange(chunk) < counts_B1
        label_BC = jnp.take_along_axis(labels_BT, at_BC, 1)
        take = partial(jnp.take_along_axis, indices=at_BC[:, :, None], axis=1)
        own = jax.tree.map(take, final)
        if isinstance(own, LikelyTokens):
            final_BCV = own.logits(len(head.table_VD)).astype(wide)
        else:
            final_BCV = logits(head.norm(own))
        p = Distribution.of(final_BCV)
        found, dx_EBTD = [], sums.dx_EBTD
        for entry, x_BTD in enumerate(x_EBTD):
            normed_BCD, norm_backward = jax.vjp(head.norm, take(x_BTD))
            q = Distribution.of(logits(normed_BCD))
            loss_BC, dlogits_BCV = block_loss(q, p, label_BC, exit_E[entry], step)
            dnormed_BCD = product("BCV,VD->BCD", dlogits_BCV.astype(x_BTD.dtype), head.table_VD)
            dnormed_BCD = jnp.where(counted_BC[..., None], dnormed_BCD, 0)
            (dx_BCD,) = norm_backward(dnormed_BCD.astype(x_BTD.dtype))
            dx_EBTD = lax.dynamic_update_slice(dx_EBTD, dx_BCD[None], (entry, 0, start, 0))
            found.append(jnp.where(counted_BC, loss_BC, 0).sum())
        return Sums(sums.each_E + jnp.stack(found), dx_EBTD)

    shape = len(x_EBTD), len(labels_BT), whole, x_EBTD.shape[-1]
    zeros = Sums(jnp.zeros(len(x_EBTD), wide), jnp.zeros(shape, x_EBTD.dtype))
    with jax.named_scope(CHUNKS):
        each_E, dx_EBTD = lax.fori_loop(0, chunks, add_chunk, zeros)
    dx_EBTD = jnp.take_along_axis(dx_EBTD, back_BT[None, :, :, None], axis=2)
    return each_E[None], dx_EBTD


def _backward(block_loss, dx_EBTD, cotangents):
    """The sums of each exit are metrics only."""
    return None, dx_EBTD * cotangents[0].astype(dx_EBTD.dtype), None, None, None, None


block_losses.defvjp(_forward, _backward)
