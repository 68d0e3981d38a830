"""The layers in training: a scan over stacked blocks, with layer dropout, and the outputs that the
exits in the loss unembed."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.config import StepConfig
from lsjax.model.attention import SAVED
from lsjax.model.block import ADAPTED
from lsjax.model.llama import Llama
from lsjax.model.rope import rope_angles
from lsjax.sharding import ROWS, constrain, on_each_device, platform, row_shards
from lsjax.training.kept_rows import Kept, run_on_kept
from lsjax.training.layer_dropout import (
    DropRates,
    drop_rates,
    keep_counted,
    keep_mask,
    row_counts,
)


def exit_states(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    exit_S: Int[Array, " S"],
    drop_rates: DropRates = drop_rates,
) -> Float[Array, "S B T D"]:
    """Outputs of the layers exit_S, in order; the last slot is the model's output.

    model: stacked, in the dtype of the computation. rows_B: numbers of the rows in the batch of the
    step. exit_S: each layer but the last once at most; what slots of L - 1 hold before the last
    one is of no meaning.

    The output of a layer with an exit is written to that exit's slot. So no more than S outputs are
    held, whatever the number of layers. Where S = L, they are the outputs of the scan.
    """
    x_BTD = model.embed_rows(batch["tokens_BT"])
    whole = platform() == "tpu"
    rope = rope_angles(batch["positions_BT"], model.config, x_BTD.dtype, whole=whole)
    run = layer_runner(config, rope, batch["segments_BT"])
    num_slots, num_layers = len(exit_S), model.config.num_layers
    picks = 1 < num_slots < num_layers
    # Slot of the exit below each layer, the last one where it has none. TPUs hold that one too and
    # write to it. Elsewhere memory counts for more, and a choice leaves the slots as they are.
    spare = platform() == "tpu"
    slot_L = jnp.full(num_layers + 1, num_slots - 1).at[exit_S + 1].set(jnp.arange(num_slots))[:-1]
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, model.config.num_layers, step, config.num_steps)
        dropout = rates_L, kept_rows(config, rates_L, step, rows_B)

    def layer(carry, inputs):
        x_BTD, slots = carry
        block, slot, dropout = inputs
        if picks:
            new = turned(x_BTD)
            if not spare:
                before = lax.dynamic_index_in_dim(slots, slot, 0, keepdims=False)
                new = jnp.where(slot < len(slots), new, lax.stop_gradient(before))
            slots = write_slot(slots, new, slot)
        x_BTD = constrain(run(block, x_BTD, dropout), ROWS)
        return (x_BTD, slots), x_BTD if num_slots == num_layers else None

    slots = None
    if picks:  # zeros would be one array with those of the loss, which XLA:GPU holds until then
        first = lax.stop_gradient(turned(x_BTD))
        slots = jnp.broadcast_to(first, (num_slots - 1 + spare, *first.shape))
    (x_BTD, slots), x_LBTD = lax.scan(layer, (x_BTD, slots), (model.layers, slot_L, dropout))
    if num_slots == num_layers:
        return x_LBTD
    if not picks:
        return x_BTD[None]
    return jnp.concatenate([turned(row_major(slots))[: num_slots - 1], x_BTD[None]])


def turned(x: Float[Array, "... T D"]) -> Float[Array, "... D T"]:
    """On TPUs, and back again. XLA:TPU has the scan's states with steps in the lanes; slots that
    lie likewise are written without a copy."""
    return x.swapaxes(-1, -2) if platform() == "tpu" else x


def row_major(slots: Array) -> Array:
    """On TPUs also the gradient of the slots, which the scan reads layer by layer."""
    if platform() != "tpu":
        return slots
    layout = Layout(tuple(range(slots.ndim)))
    by_rows = P(None, ROWS)  # the partitioner would make the slots whole for the constraint
    return on_each_device(
        lambda own: with_layout_constraint(own, layout), [slots], [by_rows], by_rows, axes=ROWS
    )


@jax.custom_vjp
def write_slot(
    slots: Float[Array, "R *shape"], x: Float[Array, "*shape"], slot: Int[Array, ""]
) -> Float[Array, "R *shape"]:
    """slots.at[slot].set(x), where each slot that is read later is written once.

    So the backward pass reads a slot's gradient and writes no slot.
    """
    return lax.dynamic_update_index_in_dim(slots, x, slot, 0)


def _write_slot_forward(slots, x, slot):
    return write_slot(slots, x, slot), slot


def _write_slot_backward(slot, dslots):
    return dslots, lax.dynamic_index_in_dim(dslots, slot, 0, keepdims=False), None


write_slot.defvjp(_write_slot_forward, _write_slot_backward)


def kept_rows(config: StepConfig, rates_L, step, rows_B) -> Kept:
    """Which rows keep each layer, as shards of rows."""
    match config.layer_dropout.skip:
        case "mask":
            return Kept(keep_mask(rates_L, config.seed, step, rows_B)[:, None], None)
        case "batch":
            keep_L1 = keep_mask(rates_L, config.seed, step, jnp.zeros_like(rows_B[:1]))
            return Kept(keep_L1[:, None], None)
        case "gather":
            rows_SR = rows_B.reshape(row_shards(len(rows_B)), -1)
            return Kept(*keep_counted(rates_L, config.seed, step, rows_SR))


def layer_runner(config: StepConfig, rope, segments_BT):
    """(block, x_BTD, None or (rate, Kept)) -> x_BTD after one layer, or without it for the rows
    that do not keep it."""

    def run(block, x_BTD, others, keep_B=None):
        return block(x_BTD, *others, config.attention, keep_B)

    remat = config.remat
    if remat == "none" and config.layer_dropout.p_max > 0 and config.layer_dropout.skip == "gather":
        remat = "dots_saveable"  # what is kept is copied once more: the rest is cheaper anew
    if remat != "none":
        policies = jax.checkpoint_policies
        policy = getattr(policies, remat)
        if remat != "nothing_saveable":
            # Attention's kernel gives results of products too.
            named = policies.save_only_these_names(SAVED, ADAPTED)
            policy = policies.save_from_both_policies(policy, named)
        run = jax.checkpoint(run, policy=policy, prevent_cse=False)  # the scan prevents it

    def rescaled(block, x_BTD, others, rate, keep_B=None):
        y_BTD = run(block, x_BTD, others, keep_B)
        if not config.layer_dropout.rescale:
            return y_BTD
        share = jnp.where(rate < 1, 1 - rate, 1).astype(x_BTD.dtype)
        return x_BTD + (y_BTD - x_BTD) / share

    def run_or_drop(block, x_BTD, dropout):
        others = rope, segments_BT
        if dropout is None:
            return run(block, x_BTD, others)
        rate, kept = dropout
        match config.layer_dropout.skip:
            case "mask":
                return rescaled(block, x_BTD, others, rate, kept.keep_SR.reshape(-1))
            case "batch":
                return lax.cond(
                    kept.keep_SR[0, 0],
                    lambda x_BTD: rescaled(block, x_BTD, others, rate),
                    lambda x_BTD: x_BTD,
                    x_BTD,
                )
            case "gather":
                counts = row_counts(kept.keep_SR.shape[1])
                return run_on_kept(rescaled, counts, block, x_BTD, others, rate, kept)

    return run_or_drop
