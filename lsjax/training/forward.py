"""Layers in training: a scan over stacked blocks with layer dropout, and the outputs of the exits
in the loss.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.config import StepConfig
from lsjax.kernels.flash_sizes import SAVED
from lsjax.kernels.rope import Rope, for_training
from lsjax.model.block import ADAPTED, HEADS, MIDDLE
from lsjax.model.llama import Llama
from lsjax.model.rope import rope_angles
from lsjax.sharding import over_context, row_shards
from lsjax.training.kept_rows import keep_counted, run_on_kept
from lsjax.training.layer_dropout import DropRates, keep_mask

_jax = jax.checkpoint_policies
# Policies that keep matmuls also keep the attention kernel's output.
_MATMULS = _jax.save_only_these_names(SAVED, ADAPTED)
# What a layer keeps for its backward pass, by `StepConfig.remat`.
POLICIES = {
    "nothing_saveable": _jax.nothing_saveable,
    "attention_output": _jax.save_only_these_names(SAVED, MIDDLE),
    "attention": _jax.save_only_these_names(HEADS, SAVED, MIDDLE),
    "dots_saveable": _jax.save_from_both_policies(_jax.dots_saveable, _MATMULS),
    "dots_with_no_batch_dims_saveable": _jax.save_from_both_policies(
        _jax.dots_with_no_batch_dims_saveable, _MATMULS
    ),
}


def exit_states(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    layer_E: Int[Array, " E"],
    drop_rates: DropRates,
) -> Float[Array, "E B T D"]:
    """Outputs of the layers layer_E, in order; the last entry is the model's output.

    model: stacked, in the dtype of the computation. rows_B: indices of the rows in the step's
    batch. layer_E: each layer but the last at most once. Entries of L - 1 before the last entry are
    unused. At most E outputs are in memory: each is written to its entry, or E = L.
    """
    num_entries, num_layers, batch = len(layer_E), model.config.num_layers, over_context(batch)
    x_BTD = model.embed_sharded(batch["tokens_BT"])
    ropes = for_training(rope_angles(batch["positions_BT"], model.config, x_BTD.dtype))
    run = layer_runner(config, ropes, batch["segments_BT"])
    picks = 1 < num_entries < num_layers
    # Entry of the exit below each layer; without an exit the last entry, which is not read. The
    # last exit has no layer above it: its number falls one beyond the end, and is cut off.
    none_n = jnp.full(num_layers + 1, num_entries - 1)
    entry_L = none_n.at[layer_E + 1].set(jnp.arange(num_entries))[:-1]
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, num_layers, step, config.num_steps)
        match config.layer_dropout.skip:
            case "mask":
                kept = keep_mask(rates_L, config.seed, step, rows_B)
            case "batch":  # one mask for all rows
                kept = keep_mask(rates_L, config.seed, step, jnp.zeros_like(rows_B[:1]))[:, 0]
            case "gather":
                rows_PR = rows_B.reshape(row_shards(len(rows_B)), -1)
                kept = keep_counted(rates_L, config.seed, step, rows_PR)
        dropout = Dropout(rates_L, kept)

    def run_layer(block, x_BTD, inputs, kind):
        return run(block, x_BTD, inputs.dropout, kind)

    # A layer's input is the output of the layer below, and goes to the entry of the exit there. The
    # last entry takes those of no exit. Unused entries (of layer L - 1) are cut off below.
    def collect(entries, x_BTD, y_BTD, inputs):
        if picks:
            entries = lax.dynamic_update_index_in_dim(entries, x_BTD, inputs.entry, 0)
        return entries, y_BTD if num_entries == num_layers else None

    entries = None
    if picks:  # XLA:GPU would merge zeros with those of the loss, and keep them until then
        entries = jnp.broadcast_to(lax.stop_gradient(x_BTD), (num_entries, *x_BTD.shape))
    inputs = LayerInputs(entry_L, dropout)
    x_BTD, entries, x_LBTD = model.scan_layers(x_BTD, run_layer, collect, entries, inputs)
    if num_entries == num_layers:
        return x_LBTD
    return jnp.concatenate([entries[:-1], x_BTD[None]]) if picks else x_BTD[None]


class Dropout(NamedTuple):
    """Rate of each layer, or of one, and who keeps it.

    kept: with skip "mask" which rows do, with "batch" whether all do, and with "gather" the rows
    and the number of their count (kept_rows.py).
    """

    rate: Float[Array, "*L"]
    kept: Any


class LayerInputs(NamedTuple):
    """What the scan over layers reads of each layer."""

    entry: Int[Array, "*L"]  # where the layer's input goes
    dropout: Dropout | None


def layer_runner(config: StepConfig, ropes: Mapping[str, Rope], segments_BT: Int[Array, "B T"]):
    """(block, x_BTD, Dropout or None, kind) -> x_BTD after one layer, for the rows that keep it.
    ropes: by `LayerKind.rope`."""
    settings, remat = config.layer_dropout, config.remat

    def run(window, block, x_BTD, row_inputs, rate=None, keep_B=None):
        y_BTD = block(x_BTD, *row_inputs, config.attention, keep_B, window)
        if rate is None or not settings.rescale:
            return y_BTD
        share = jnp.where(rate < 1, 1 - rate, 1).astype(x_BTD.dtype)
        return x_BTD + (y_BTD - x_BTD) / share

    if remat == "none" and settings.p_max > 0 and settings.skip == "gather":
        remat = "dots_saveable"  # residuals are copied once more; recomputing the rest is cheaper
    if remat != "none":
        # Inside a scan, jax needs no barrier against common subexpressions.
        run = jax.checkpoint(run, policy=POLICIES[remat], prevent_cse=False, static_argnums=0)

    def run_or_drop(block, x_BTD, dropout, kind):
        run_kind, row_inputs = partial(run, kind.window), (ropes[kind.rope], segments_BT)
        if dropout is None:
            return run_kind(block, x_BTD, row_inputs)
        rate, kept = dropout
        match settings.skip:
            case "mask":
                return run_kind(block, x_BTD, row_inputs, rate, kept)
            case "gather":
                return run_on_kept(run_kind, block, x_BTD, row_inputs, rate, *kept)
            case "batch":
                run_all = partial(run_kind, block, row_inputs=row_inputs, rate=rate)
                return lax.cond(kept, run_all, lambda x: x, x_BTD)

    return run_or_drop
