"""Cross entropy of many hidden states through one head, without their logits ever being held.

Positions in the loss come first in each row; chunks of them go through the head one after the
other, as many as the fullest row has. A chunk's gradient is computed beside its loss, so that the
head passes over it three times (logits, gradient of the states, gradient of the table) and not a
fourth time in the backward pass.

Letters: S slots of hidden states (exits), C positions of a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.model.block import RMSNorm
from lsjax.model.llama import Llama
from lsjax.sharding import ROWS, chunk_steps, on_each_device, platform

# Logits of a chunk, on each device.
CHUNK_LOGITS = 2**25
# On TPUs, where each chunk's pass over the table's gradient in float32 would show.
TPU_CHUNK_LOGITS = 2**27
# The loops of which only a step knows the trip counts, by their names in the compiled program.
EXITS, CHUNKS = "exit_losses", "loss_chunks"


class Head(NamedTuple):
    """Final norm and head, in the dtype of the parameters."""

    norm: RMSNorm
    table_VD: Float[Array, "V D"]


class Positions(NamedTuple):
    """Which positions of each slot's rows are in the loss."""

    order_SBT: Int[Array, "S B T"]  # those in the loss first
    counts_SB: Int[Array, "S B"]  # how many they are
    scales_SB: Float[Array, "S B"]  # what each of them stands for


def head_of(model: Llama) -> Head:
    """The part of the model that every exit shares."""
    return Head(model.norm, model.head_table)


def loss_chunk(batch: int, steps: int, vocab: int) -> int:
    """C: positions of each row that pass the head together."""
    logits = TPU_CHUNK_LOGITS if platform() == "tpu" else CHUNK_LOGITS
    return chunk_steps(batch, steps, vocab, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_loss(
    target: str,
    z_loss: float,
    head: Head,
    x_SBTD: Float[Array, "S B T D"],
    labels_BT: Int[Array, "B T"],
    positions: Positions,
    weights_S: Float[Array, " S"],
) -> tuple[Float[Array, ""], Float[Array, " S"]]:
    """Weighted sum over slots of their summed losses, and each slot's sum.

    target: what slots but the last learn: "labels", or the "final" slot's distribution (their loss
    is then the divergence of theirs from it, through which nothing flows back). z_loss: weight of
    log(Z)^2, which the weighted sum includes and the sums do not.
    """
    return _forward(target, z_loss, head, x_SBTD, labels_BT, positions, weights_S)[0]


def _forward(target, z_loss, head, x_SBTD, labels_BT, positions, weights_S):
    """Each device goes through the head with its own rows, and adds up the gradient of the table
    that they give; the sum over devices is taken once, at the end."""
    _, batch, steps, _ = x_SBTD.shape
    chunk = loss_chunk(batch, steps, len(head.table_VD))
    chunks_S = -(-positions.counts_SB.max(1) // chunk)
    narrow = Head(head.norm, head.table_VD.astype(x_SBTD.dtype))
    sums, dx_SBTD = on_each_device(
        partial(_own_rows, target, z_loss, chunk),
        (narrow, x_SBTD, labels_BT, positions, weights_S, chunks_S),
        (P(), P(None, ROWS), P(ROWS), P(None, ROWS), P(), P()),
        (P(ROWS), P(None, ROWS)),
        axes=ROWS,
    )
    losses, dhead = jax.tree.map(lambda leaf: leaf.sum(0), sums)
    dhead = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), dhead, head)
    return losses, (dhead, dx_SBTD)


def _own_rows(target, z_loss, chunk, head, x_SBTD, labels_BT, positions, weights_S, chunks_S):
    """Losses and gradients of a device's rows: what is to be summed over devices, with an axis of
    1 in front, and the gradient of the states.

    chunks_S: that there are in each slot's fullest row, of all rows.
    """
    slots, batch, steps, width = x_SBTD.shape
    vocab = len(head.table_VD)
    chunks = -(-steps // chunk)
    wide = jnp.promote_types(x_SBTD.dtype, jnp.float32)
    table_VD = head.table_VD
    table_DV = table_VD.T

    def logits_of(normed_BCD):
        # The table is the left operand here too: the products are the quicker for it on XLA:CPU.
        return jnp.einsum("VD,BCD->VBC", table_VD, normed_BCD, preferred_element_type=wide)

    def slot_loss(learns, slot, carry):
        """Adds one slot's loss and gradients; that of its states takes their place."""
        total, sums_S, dnorm, dtable_VD, slots_SBTD = carry
        x_BTD, weight = slots_SBTD[slot], weights_S[slot].astype(wide)
        order_BT, count_B = positions.order_SBT[slot], positions.counts_SB[slot]
        scale_B = positions.scales_SB[slot].astype(wide)
        padding = chunks * chunk - steps
        padded_BT = jnp.pad(order_BT, ((0, 0), (0, padding)))

        def chunk_loss(index, carry):
            total, sum_, dnorm, dtable_VD, sorted_BTD = carry
            start = index * chunk
            at_BC = lax.dynamic_slice_in_dim(padded_BT, start, chunk, 1)
            counted_BC = start + jnp.arange(chunk) < count_B[:, None]
            scale_BC = jnp.where(counted_BC, scale_B[:, None], 0)
            x_BCD = jnp.take_along_axis(x_BTD, at_BC[:, :, None], 1)
            normed_BCD, norm_backward = jax.vjp(lambda norm, x: norm(x), head.norm, x_BCD)
            logits_VBC = logits_of(normed_BCD)
            log_z_BC = jax.nn.logsumexp(logits_VBC, axis=0)
            if learns == "labels":
                label_BC = jnp.take_along_axis(labels_BT, at_BC, 1)
                wanted_VBC = jnp.arange(vocab)[:, None, None] == label_BC
                loss_BC = log_z_BC - jnp.where(wanted_VBC, logits_VBC, 0).sum(0)
            else:
                final_BCD = jnp.take_along_axis(slots_SBTD[-1], at_BC[:, :, None], 1)
                log_wanted_VBC = jax.nn.log_softmax(logits_of(head.norm(final_BCD)), axis=0)
                wanted_VBC = jnp.exp(log_wanted_VBC)
                loss_BC = (wanted_VBC * (log_wanted_VBC - logits_VBC + log_z_BC)).sum(0)
            added = (scale_BC * loss_BC).sum()
            total += weight * (added + z_loss * (scale_BC * jnp.square(log_z_BC)).sum())
            # d loss / d logits, in the dtype of the products that follow.
            softmax_VBC = jnp.exp(logits_VBC - log_z_BC)
            dlogits_VBC = softmax_VBC * (1 + 2 * z_loss * log_z_BC) - wanted_VBC
            dlogits_VBC = (weight * scale_BC * dlogits_VBC).astype(x_BCD.dtype)
            # The table is turned once for all chunks, the logits would be for each.
            dnormed_BCD = jnp.einsum("DV,VBC->DBC", table_DV, dlogits_VBC).transpose(1, 2, 0)
            dtable_VD += jnp.einsum(
                "VBC,BCD->VD", dlogits_VBC, normed_BCD, preferred_element_type=wide
            )
            more_dnorm, dx_BCD = norm_backward(dnormed_BCD)
            dnorm = jax.tree.map(jnp.add, dnorm, more_dnorm)
            sorted_BTD = lax.dynamic_update_slice_in_dim(sorted_BTD, dx_BCD, start, 1)
            return total, sum_ + added, dnorm, dtable_VD, sorted_BTD

        sorted_BTD = jnp.zeros((batch, chunks * chunk, width), x_SBTD.dtype)
        carry = (total, jnp.zeros((), wide), dnorm, dtable_VD, sorted_BTD)
        with jax.named_scope(CHUNKS):
            carry = lax.fori_loop(0, chunks_S[slot], chunk_loss, carry)
        total, sum_, dnorm, dtable_VD, sorted_BTD = carry
        back_BT = jnp.argsort(order_BT, axis=1)
        dx_BTD = jnp.take_along_axis(sorted_BTD, back_BT[:, :, None], 1)
        slots_SBTD = lax.dynamic_update_index_in_dim(slots_SBTD, dx_BTD, slot, 0)
        return total, sums_S.at[slot].set(sum_), dnorm, dtable_VD, slots_SBTD

    carry = (
        jnp.zeros((), wide),
        jnp.zeros(slots, wide),
        jax.tree.map(jnp.zeros_like, head.norm),
        jnp.zeros(table_VD.shape, wide),
        x_SBTD,
    )
    if slots > 1:
        used_S = chunks_S[:-1] > 0
        order_S = jnp.argsort(~used_S, stable=True)

        def used_slot_loss(index, carry):
            return slot_loss(target, order_S[index], carry)

        with jax.named_scope(EXITS):
            carry = lax.fori_loop(0, used_S.sum(), used_slot_loss, carry)
        *rest, slots_SBTD = carry
        keep_S = jnp.append(used_S, True)[:, None, None, None]
        carry = *rest, jnp.where(keep_S, slots_SBTD, 0)
    total, sums_S, dnorm, dtable_VD, dx_SBTD = slot_loss("labels", slots - 1, carry)
    sums = (total, sums_S), Head(dnorm, dtable_VD)
    return jax.tree.map(lambda leaf: leaf[None], sums), dx_SBTD


def _backward(target, z_loss, gradients, cotangents):
    """Nothing flows back from the sums: they are for people."""
    scale = cotangents[0]
    head, x_SBTD = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients)
    return head, x_SBTD, None, None, None


head_loss.defvjp(_forward, _backward)
