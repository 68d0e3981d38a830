"""The losses of exits through one head, in chunks of positions, with their gradients.

The logits are never all in memory at once. Each chunk's gradient is computed with its loss, in
three matmuls with the head: logits, gradient of the states, gradient of the table.

E: entries of exits, the last exit last.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.kernels.loss_chunks import loss_chunk
from lsjax.sharding import PIECES, on_each_device
from lsjax.training.early_exit import ExitLoss, cross_entropy, with_exit
from lsjax.training.logit_gradients import (
    Losses,
    chunk_loss,
    of_any_loss,
    of_cross_entropy,
    scaled,
)

# Smallest vocabulary, in widths of the model, for which `of_cross_entropy` pays: it spares a pass
# over the logits, and adds work to two matmuls.
ONE_PASS = 12
# Loops whose trip count depends on the step; names in the compiled program.
EXITS, CHUNKS = "exits", "loss_chunks"


class Head(NamedTuple):
    """Final norm and head, in the dtype of the parameters. norm: a module, or any tree of arrays
    that can be called with states [..., D]."""

    norm: Callable[[Array], Array]
    table_VD: Float[Array, "V D"]


class Entries(NamedTuple):
    """What the loss reads of each entry."""

    weights_E: Float[Array, " E"]
    exit_E: Int[Array, " E"]  # 1..L
    step: Int[Array, ""]


class HeadSettings(NamedTuple):
    """How entries pass through the head."""

    exit_loss: ExitLoss  # of every entry but the last
    z_loss: float
    exit_chunk: int  # positions of a chunk in the entries of exits
    last_chunk: int  # and in the last


class Positions(NamedTuple):
    """Positions of each entry's rows that are in the loss."""

    order_EBT: Int[Array, "E B T"]  # positions in the loss first
    counts_EB: Int[Array, "E B"]  # number of positions in the loss
    scales_EB: Float[Array, "E B"]  # weight of each position (more than 1 if sampled)


class Found(NamedTuple):
    """Losses so far, and the gradients of the head (its table as [D, V]) and of the states."""

    losses: Losses
    dhead: Head
    dx: Float[Array, "*shape D"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def head_loss(
    exit_loss: ExitLoss,
    z_loss: float,
    token_share: float,
    head: Head,
    x_EBTD: Float[Array, "E B T D"],
    labels_BT: Int[Array, "B T"],
    positions: Positions,
    entries: Entries,
) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """Weighted sum over entries of their summed losses, and each entry's sum. exit_loss: loss of
    every entry but the last. z_loss: weight of log(Z)^2, included in the weighted sum only.
    token_share: of a row's positions, in all entries but the last."""
    settings = exit_loss, z_loss, token_share
    return _forward(*settings, head, x_EBTD, labels_BT, positions, entries)[0]


@jax.named_scope("head")
def _forward(exit_loss, z_loss, token_share, head, x_EBTD, labels_BT, positions, entries):
    """Each device accumulates the table gradient of its rows. One all-reduce at the end sums it."""
    num_entries, batch, steps, _ = x_EBTD.shape
    shape = batch, steps, head.table_VD.shape
    exit_chunk, last_chunk = loss_chunk(*shape, float(token_share)), loss_chunk(*shape)
    size_E = jnp.array([exit_chunk] * (num_entries - 1) + [last_chunk])
    chunks_E = -(-positions.counts_EB.max(1) // size_E)
    narrow = Head(head.norm, head.table_VD.astype(x_EBTD.dtype))
    function = partial(_own_rows, HeadSettings(exit_loss, z_loss, exit_chunk, last_chunk))
    arrays = narrow, x_EBTD, labels_BT, positions, entries, chunks_E
    specs = P(), P(None, PIECES), P(PIECES), P(None, PIECES), P(), P()
    outputs = P(PIECES), P(None, PIECES)
    sums, dx_EBTD = on_each_device(function, arrays, specs, outputs, axes=PIECES)
    losses, dhead = jax.tree.map(lambda leaf: leaf.sum(0), sums)
    dhead = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), dhead, head)
    return losses, (dhead, dx_EBTD)


def _own_rows(settings, head, x_EBTD, labels_BT, positions, entries, chunks_E):
    """Losses and gradients of a device's rows. Values to sum over devices have a leading axis of
    size 1. chunks_E: number of chunks per entry, set by the row with most positions."""
    found = _Rows(settings, head, labels_BT, positions, entries, chunks_E).all_entries(x_EBTD)
    dhead = Head(found.dhead.norm, found.dhead.table_VD.T)
    return jax.tree.map(lambda leaf: leaf[None], (found.losses, dhead)), found.dx


class _Rows:
    """A device's rows in the loss: chunks of entries pass through the head and back. Their losses
    and gradients are added up. The gradient of an entry's states overwrites the states.

    Exits come first: their losses may read the last entry's states.
    """

    def __init__(self, settings, head, labels_BT, positions, entries, chunks_E):
        self.settings, self.head, self.labels_BT = settings, head, labels_BT
        self.positions, self.entries, self.chunks_E = positions, entries, chunks_E
        self.table_DV = head.table_VD.T  # once here, or XLA would transpose it in every chunk
        self.wide = jnp.promote_types(head.table_VD.dtype, jnp.float32)
        self.product = partial(jnp.einsum, preferred_element_type=self.wide)
        large = len(head.table_VD) >= ONE_PASS * head.table_VD.shape[1]
        self.one_pass = large and not settings.z_loss

    def all_entries(self, x_EBTD) -> Found:
        """Losses and gradients of all entries."""
        num_entries, wide, settings = len(x_EBTD), self.wide, self.settings
        losses = Losses(jnp.zeros((), wide), jnp.zeros(num_entries, wide))
        dnorm = jax.tree.map(jnp.zeros_like, self.head.norm)
        found = Found(losses, Head(dnorm, jnp.zeros(self.table_DV.shape, wide)), x_EBTD)
        if num_entries > 1:
            used_E = self.chunks_E[:-1] > 0
            order_E = jnp.argsort(~used_E, stable=True)

            def add_exit(index, found):
                entry = order_E[index]
                loss = with_exit(settings.exit_loss, self.entries.exit_E[entry], self.entries.step)
                return self.add_entry(loss, settings.exit_chunk, entry, found)

            with jax.named_scope(EXITS):
                found = lax.fori_loop(0, used_E.sum(), add_exit, found)
            keep_E = jnp.append(used_E, True)[:, None, None, None]
            found = found._replace(dx=jnp.where(keep_E, found.dx, 0))
        return self.add_entry(cross_entropy, settings.last_chunk, num_entries - 1, found)

    def add_entry(self, entry_loss, chunk, entry, found) -> Found:
        """Adds one entry's loss and gradients."""
        losses, dhead, entries_EBTD = found
        batch, steps, width = entries_EBTD.shape[1:]
        whole = -(-steps // chunk) * chunk  # steps, padded to full chunks
        positions, wide = self.positions, self.wide
        order_BT = jnp.pad(positions.order_EBT[entry], [(0, 0), (0, whole - steps)])
        x_BTD, final_BTD = entries_EBTD[entry], entries_EBTD[-1]
        weight = self.entries.weights_E[entry].astype(wide)

        def add_chunk(index, own):
            start = index * chunk
            at_BC = lax.dynamic_slice_in_dim(order_BT, start, chunk, 1)
            counted_BC = start + jnp.arange(chunk) < positions.counts_EB[entry, :, None]
            scale_BC = jnp.where(counted_BC, positions.scales_EB[entry, :, None], 0).astype(wide)
            label_BC = jnp.take_along_axis(self.labels_BT, at_BC, 1)
            x_BCD = jnp.take_along_axis(x_BTD, at_BC[:, :, None], 1)
            final = partial(jnp.take_along_axis, final_BTD, at_BC[:, :, None], 1)
            new = self.through_head(entry_loss, x_BCD, final, label_BC, scale_BC, weight)
            return Found(
                losses=jax.tree.map(jnp.add, own.losses, new.losses),
                dhead=jax.tree.map(jnp.add, own.dhead, new.dhead),
                dx=lax.dynamic_update_slice_in_dim(own.dx, new.dx, start, 1),
            )

        zeros_BTD = jnp.zeros((batch, whole, width), entries_EBTD.dtype)
        own = Found(losses._replace(metric=jnp.zeros((), wide)), dhead, zeros_BTD)
        with jax.named_scope(CHUNKS):
            own = lax.fori_loop(0, self.chunks_E[entry], add_chunk, own)
        back_BT = jnp.argsort(positions.order_EBT[entry], axis=1)
        dx_BTD = jnp.take_along_axis(own.dx, back_BT[:, :, None], 1)
        entries_EBTD = lax.dynamic_update_index_in_dim(entries_EBTD, dx_BTD, entry, 0)
        metric_E = losses.metric.at[entry].set(own.losses.metric)
        return Found(Losses(own.losses.objective, metric_E), own.dhead, entries_EBTD)

    def through_head(self, entry_loss, x_BCD, final, label_BC, scale_BC, weight) -> Found:
        """Losses of a chunk, and the gradients of the head and the states. final: returns the last
        entry's states."""
        head, product, table_DV = self.head, self.product, self.table_DV
        normed_BCD, norm_backward = jax.vjp(lambda norm, x: norm(x), head.norm, x_BCD)
        arrays = product("BCD,DV->BCV", normed_BCD, table_DV), label_BC, scale_BC, weight
        if self.one_pass and entry_loss is cross_entropy:
            found = of_cross_entropy(*arrays, x_BCD.dtype)
        else:
            final_BCV = product("BCD,DV->BCV", head.norm(final()), table_DV)
            loss = partial(chunk_loss, entry_loss, self.settings.z_loss, final_BCV)
            found = of_any_loss(loss, *arrays, x_BCD.dtype)
        dnormed_BCD = product("BCV,VD->BCD", found.array_BCV, head.table_VD)
        dnormed_BCD, normed_BCD = scaled((dnormed_BCD, normed_BCD), found.factor_BC, x_BCD.dtype)
        dtable_DV = product("BCD,BCV->DV", normed_BCD, found.array_BCV)
        dnorm, dx_BCD = norm_backward(dnormed_BCD)
        return Found(found.losses, Head(dnorm, dtable_DV), dx_BCD)


def _backward(exit_loss, z_loss, token_share, gradients, cotangents):
    """No gradient flows through the per-exit sums: they are metrics only."""
    scale = cotangents[0]
    head, x_EBTD = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients)
    return head, x_EBTD, None, None, None


head_loss.defvjp(_forward, _backward)
