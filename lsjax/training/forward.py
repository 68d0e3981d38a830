"""The layers in training: a scan over stacked blocks, with layer dropout, and the outputs that the
exits in the loss unembed."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.config import StepConfig
from lsjax.model.block import ADAPTED
from lsjax.model.llama import Llama
from lsjax.model.products import rows_where
from lsjax.model.rope import rope_angles
from lsjax.model.self_attention import SAVED
from lsjax.sharding import ROWS, constrain, platform, row_shards
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

    Every layer writes its output to a slot: to that of its exit, or to the last one, where the last
    layer has the last word. So no more than S outputs are held, whatever the number of layers.
    Where S = L, slot and layer are one, and the outputs are those of the scan.
    """
    x_BTD = model.embed_rows(batch["tokens_BT"])
    whole = platform() == "tpu"
    rope = rope_angles(batch["positions_BT"], model.config, x_BTD.dtype, whole=whole)
    run = layer_runner(config, rope, batch["segments_BT"])
    num_slots, num_layers = len(exit_S), model.config.num_layers
    picks = 1 < num_slots < num_layers
    slot_L = jnp.full(num_layers, num_slots - 1).at[exit_S].set(jnp.arange(num_slots))
    slot_L = slot_L.at[-1].set(num_slots - 1)
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, model.config.num_layers, step, config.num_steps)
        dropout = rates_L, kept_rows(config, rates_L, step, rows_B)

    def layer(carry, inputs):
        x_BTD, slots_SBTD = carry
        block, slot, dropout = inputs
        x_BTD = constrain(run(block, x_BTD, dropout), ROWS)
        if picks:
            slots_SBTD = lax.dynamic_update_index_in_dim(slots_SBTD, x_BTD, slot, 0)
        return (x_BTD, slots_SBTD), x_BTD if num_slots == num_layers else None

    slots_SBTD = jnp.zeros((num_slots, *x_BTD.shape), x_BTD.dtype) if picks else None
    (x_BTD, slots_SBTD), x_LBTD = lax.scan(
        layer, (x_BTD, slots_SBTD), (model.layers, slot_L, dropout)
    )
    if num_slots == num_layers:
        return x_LBTD
    return slots_SBTD if picks else x_BTD[None]


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

    def run(block, x_BTD, others):
        return block(x_BTD, *others, config.attention)

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

    def rescaled(block, x_BTD, others, rate):
        y_BTD = run(block, x_BTD, others)
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
                keep_B = kept.keep_SR.reshape(-1)
                return rows_where(keep_B, rescaled(block, x_BTD, others, rate), x_BTD)
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
