"""The loss of exit blocks (lsjax/model/exit_blocks.py): how far they are from the last exit.

The model is frozen. One forward pass gives the states after the exits and after the last layer, and
nothing flows back through it. Labelled positions pass through the head in chunks. A chunk computes
the last exit's logits once. For each block it computes logits, loss and the gradient of the states.
The head gets no gradient.

E: exit blocks.
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
from lsjax.model.llama import Llama, stacked
from lsjax.model.matrices import cast_matrices
from lsjax.model.rope import rope_angles
from lsjax.sharding import PIECES, in_context_order, on_each_device, over_context, pieces
from lsjax.training.early_exit import ExitLoss, cross_entropy, divergence, log_z, with_exit
from lsjax.training.forward import exit_states
from lsjax.training.head_loss import Head
from lsjax.training.layer_dropout import drop_rates


def block_objective(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    num_labels: Int[Array, ""],
    exit_loss: ExitLoss | None = None,
) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Mean loss of the blocks over some rows, and the summed loss of each exit with a block. For
    the last exit it is the model's cross entropy. Arguments as of `objective`."""
    exits, num_layers = config.exit_blocks.exits, model.config.num_layers
    x_EBTD, final_BTD = block_states(config, cast_matrices(model, config.dtype), batch)
    x_EBTD, final_BTD = jax.vmap(pieces)(x_EBTD), pieces(final_BTD)
    labels_BT = pieces(in_context_order(batch["labels_BT"]))
    head = lax.stop_gradient(Head(model.norm, model.head_table))
    given = x_EBTD, final_BTD, labels_BT, jnp.array(exits), step
    loss, sums_n = block_losses(exit_loss or acceptance_loss(config), head, *given)
    scale = 1 / (len(exits) * jnp.maximum(num_labels, 1))
    layers = jnp.array([*exits, num_layers]) - 1
    return loss * scale, jnp.zeros(num_layers, sums_n.dtype).at[layers].set(sums_n)


def block_states(
    config: StepConfig, model: Llama, batch: dict[str, Array]
) -> tuple[Float[Array, "E B T D"], Float[Array, "B T D"]]:
    """What each exit block makes of the states after its exit, and the states after the last layer,
    in one pass. Gradients flow to the blocks alone. model: in the computation's dtype."""
    model = stacked(model)
    exits = sorted(map(int, model.exit_blocks))
    layer_E = jnp.array([*exits, model.config.num_layers]) - 1
    frozen, rows_B = replace(config, layer_dropout=LayerDropoutConfig()), jnp.zeros(0, jnp.int32)
    states = exit_states(frozen, model, batch, jnp.int32(0), rows_B, layer_E, drop_rates)
    *before, final_BTD = lax.stop_gradient(states)
    batch = over_context(batch)
    ropes = for_training(rope_angles(batch["positions_BT"], model.config, final_BTD.dtype))
    after = []
    for exit_layer, x_BTD in zip(exits, before, strict=True):
        rope, window = model.config.layer_kind(exit_layer)
        given = ropes[rope], batch["segments_BT"], config.attention
        after.append(model.exit_blocks[f"{exit_layer}"](x_BTD, *given, window=window))
    return jnp.stack(after), final_BTD


def acceptance_loss(config: StepConfig) -> ExitLoss:
    """KL(p || q), and from `exit_blocks.acceptance_from` on -log sum min(p, q): the log of the
    chance that a sampled draft is accepted."""
    first = config.exit_blocks.acceptance_from * config.num_steps

    def loss(logits, labels, final_logits, step):
        given = logits, labels, final_logits
        return lax.cond(step < first, divergence, rejection, *given)

    return loss


def rejection(
    logits: Float[Array, "... V"], labels: Int[Array, "..."], final_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
    """-log sum min(p, q) of this exit's distribution q and the last one's, p."""
    log_p, log_q = (x - log_z(x)[..., None] for x in (final_logits, logits))
    return -log_z(jnp.minimum(log_p, log_q))


class Sums(NamedTuple):
    """The loss of all blocks, that of each and of the last exit, and the gradients of the blocks'
    states. Losses are sums over positions."""

    loss: Float[Array, ""]
    each_n: Float[Array, " n"]
    dx_EBTD: Float[Array, "E B T D"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_losses(
    exit_loss: ExitLoss,
    head: Head,
    x_EBTD: Float[Array, "E B T D"],
    final_BTD: Float[Array, "B T D"],
    labels_BT: Int[Array, "B T"],
    exit_E: Int[Array, " E"],
    step: Int[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Sum of the losses of all blocks, whose gradient flows to x_EBTD; and the sum of each, with
    the last exit's cross entropy at the end. Labels below 0 are left out."""
    return _forward(exit_loss, head, x_EBTD, final_BTD, labels_BT, exit_E, step)[0]


@jax.named_scope("head")
def _forward(exit_loss, head, x_EBTD, final_BTD, labels_BT, exit_E, step):
    narrow = Head(head.norm, head.table_VD.astype(x_EBTD.dtype))
    counts_B = (labels_BT >= 0).sum(1)
    chunk = loss_chunk(*labels_BT.shape, head.table_VD.shape)
    chunks = -(-counts_B.max() // chunk)
    function = partial(_own_rows, exit_loss, chunk)
    arrays = narrow, x_EBTD, final_BTD, labels_BT, exit_E, step, chunks
    rows, entries = P(PIECES), P(None, PIECES)
    specs, outputs = (P(), entries, rows, rows, P(), P(), P()), (rows, rows, entries)
    found = on_each_device(function, arrays, specs, outputs, axes=PIECES)
    loss_n, each_nn, dx_EBTD = found
    return (loss_n.sum(), each_nn.sum(0)), dx_EBTD


def _own_rows(exit_loss, chunk, head, x_EBTD, final_BTD, labels_BT, exit_E, step, chunks):
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
        final_BCV = logits(head.norm(take(final_BTD)))
        found, dx_EBTD = [], sums.dx_EBTD
        for entry, x_BTD in enumerate(x_EBTD):
            normed_BCD, norm_backward = jax.vjp(head.norm, take(x_BTD))
            of_exit = with_exit(exit_loss, exit_E[entry], step)

            def loss(logits_BCV, of_exit=of_exit):
                return jnp.where(counted_BC, of_exit(logits_BCV, label_BC, final_BCV), 0).sum()

            value, dlogits_BCV = jax.value_and_grad(loss)(logits(normed_BCD))
            dnormed_BCD = product("BCV,VD->BCD", dlogits_BCV.astype(x_BTD.dtype), head.table_VD)
            (dx_BCD,) = norm_backward(dnormed_BCD.astype(x_BTD.dtype))
            dx_EBTD = lax.dynamic_update_slice(dx_EBTD, dx_BCD[None], (entry, 0, start, 0))
            found.append(value)
        last = jnp.where(counted_BC, cross_entropy(final_BCV, label_BC), 0).sum()
        each_n = sums.each_n + jnp.stack([*found, last])
        return Sums(sums.loss + sum(found), each_n, dx_EBTD)

    shape = len(x_EBTD), len(labels_BT), whole, x_EBTD.shape[-1]
    zeros = Sums(
        jnp.zeros((), wide), jnp.zeros(1 + len(x_EBTD), wide), jnp.zeros(shape, x_EBTD.dtype)
    )
    loss, each_n, dx_EBTD = lax.fori_loop(0, chunks, add_chunk, zeros)
    dx_EBTD = jnp.take_along_axis(dx_EBTD, back_BT[None, :, :, None], axis=2)
    return loss[None], each_n[None], dx_EBTD


def _backward(exit_loss, dx_EBTD, cotangents):
    """The sums of each exit are metrics only."""
    return None, dx_EBTD * cotangents[0].astype(dx_EBTD.dtype), None, None, None, None


block_losses.defvjp(_forward, _backward)
