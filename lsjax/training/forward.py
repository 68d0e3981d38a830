"""Layers in training: a scan over stacked blocks with layer dropout, and the outputs of the exits
in the loss."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.config import StepConfig
from lsjax.model.block import ADAPTED
from lsjax.model.llama import Llama
from lsjax.model.operations import SAVED, Rope, rope_angles
from lsjax.sharding import platform, row_shards
from lsjax.training.kept_rows import Kept, run_on_kept
from lsjax.training.layer_dropout import DropRates, drop_rates, keep_counted, keep_mask


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

    model: stacked, in the dtype of the computation. rows_B: indices of the rows in the step's
    batch. exit_S: each layer but the last at most once. Slots of L - 1 before the last slot are
    unused.

    At most S outputs are in memory: a layer's output is written to the slot of its exit. If S = L,
    they are the outputs of the scan.
    """
    num_slots, num_layers = len(exit_S), model.config.num_layers
    x_BTD = model.embed_rows(batch["tokens_BT"])
    whole = platform() == "tpu"
    ropes = rope_angles(batch["positions_BT"], model.config, x_BTD.dtype, whole=whole)
    run = layer_runner(config, ropes, batch["segments_BT"])
    picks = 1 < num_slots < num_layers
    # Slot of the exit below each layer; without an exit the last slot, which is not read.
    slot_L = jnp.full(num_layers + 1, num_slots - 1).at[exit_S + 1].set(jnp.arange(num_slots))[:-1]
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, num_layers, step, config.num_steps)
        dropout = rates_L, kept_rows(config, rates_L, step, rows_B)

    def look(slots, x_BTD, y_BTD, inputs):
        if picks:
            slots = lax.dynamic_update_index_in_dim(slots, x_BTD, inputs[0], 0)
        return slots, y_BTD if num_slots == num_layers else None

    slots = None
    if picks:  # XLA:GPU would merge zeros with those of the loss, and keep them until then
        slots = jnp.broadcast_to(lax.stop_gradient(x_BTD), (num_slots, *x_BTD.shape))

    def run_layer(block, x_BTD, inputs, kind):
        return run(block, x_BTD, inputs[1], kind)

    x_BTD, slots, x_LBTD = model.scan_layers(x_BTD, run_layer, look, slots, (slot_L, dropout))
    if num_slots == num_layers:
        return x_LBTD
    if not picks:
        return x_BTD[None]
    return jnp.concatenate([slots[:-1], x_BTD[None]])


def kept_rows(
    config: StepConfig, rates_L: Float[Array, " L"], step: Int[Array, ""], rows_B: Int[Array, " B"]
) -> Array | Kept:
    """Rows that keep each layer: [L, B], [L] for all rows at once, or Kept."""
    match config.layer_dropout.skip:
        case "mask":
            return keep_mask(rates_L, config.seed, step, rows_B)
        case "batch":
            return keep_mask(rates_L, config.seed, step, jnp.zeros_like(rows_B[:1]))[:, 0]
        case "gather":
            rows_SR = rows_B.reshape(row_shards(len(rows_B)), -1)
            return Kept(*keep_counted(rates_L, config.seed, step, rows_SR))


def layer_runner(config: StepConfig, ropes: Mapping[str, Rope], segments_BT: Int[Array, "B T"]):
    """(block, x_BTD, None or (rate, kept), kind) -> x_BTD after one layer, for the rows that keep
    it. ropes: by `LayerKind.rope`."""
    dropout, remat = config.layer_dropout, config.remat

    def run(window, block, x_BTD, others, rate=None, keep_B=None):
        y_BTD = block(x_BTD, *others, config.attention, keep_B, window)
        if rate is None or not dropout.rescale:
            return y_BTD
        share = jnp.where(rate < 1, 1 - rate, 1).astype(x_BTD.dtype)
        return x_BTD + (y_BTD - x_BTD) / share

    if remat == "none" and dropout.p_max > 0 and dropout.skip == "gather":
        remat = "dots_saveable"  # residuals are copied once more; recomputing the rest is cheaper
    if remat != "none":
        policies = jax.checkpoint_policies
        policy = getattr(policies, remat)
        if remat != "nothing_saveable":
            # The attention kernel's output counts as a matmul too.
            named = policies.save_only_these_names(SAVED, ADAPTED)
            policy = policies.save_from_both_policies(policy, named)
        # The scan prevents common subexpressions.
        run = jax.checkpoint(run, policy=policy, prevent_cse=False, static_argnums=0)

    def run_or_drop(block, x_BTD, rate_and_kept, kind):
        run_kind, others = partial(run, kind.window), (ropes[kind.rope], segments_BT)
        if rate_and_kept is None:
            return run_kind(block, x_BTD, others)
        rate, kept = rate_and_kept
        match dropout.skip:
            case "mask":
                return run_kind(block, x_BTD, others, rate, kept)
            case "batch":
                run_all = partial(run_kind, block, others=others, rate=rate)
                return lax.cond(kept, run_all, lambda x: x, x_BTD)
            case "gather":
                return run_on_kept(run_kind, block, x_BTD, others, rate, kept)

    return run_or_drop
