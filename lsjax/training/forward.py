"""The layers in training: a scan over stacked blocks, with layer dropout, and the outputs that the
exits in the loss unembed."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig
from lsjax.model.llama import Llama
from lsjax.model.rope import rope_angles
from lsjax.sharding import constrain
from lsjax.training.layer_dropout import drop_rates, keep_mask


def exit_states(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    enabled_L: Bool[Array, " L"],
    num_slots: int,
) -> Float[Array, "S B T D"]:
    """Outputs of the layers whose exits are on, in order; the last slot is the model's output.

    model: stacked, in the dtype of the computation. rows_B: numbers of the rows in the batch of the
    step. num_slots: S, which no step's exits exceed; slots that no exit takes hold zeros.

    Every layer writes its output to a slot: to that of its exit, or to the last one, where the last
    layer has the last word. So no more than S outputs are held, whatever the number of layers.
    """
    x_BTD = constrain(model.embed(batch["tokens_BT"]), "data")
    rope = rope_angles(batch["positions_BT"], model.config, x_BTD.dtype)
    run = layer_runner(config, rope, batch["segments_BT"])
    slot_L = (
        jnp.where(enabled_L, jnp.cumsum(enabled_L) - 1, num_slots - 1).at[-1].set(num_slots - 1)
    )
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, model.config.num_layers, step, config.num_steps)
        rows_B = jnp.zeros_like(rows_B[:1]) if config.layer_dropout.per_batch else rows_B
        dropout = keep_mask(rates_L, config.seed, step, rows_B), rates_L

    def layer(carry, inputs):
        x_BTD, slots_SBTD = carry
        block, slot, dropout = inputs
        x_BTD = constrain(run(block, x_BTD, dropout), "data")
        if num_slots > 1:
            slots_SBTD = lax.dynamic_update_index_in_dim(slots_SBTD, x_BTD, slot, 0)
        return (x_BTD, slots_SBTD), None

    slots_SBTD = jnp.zeros((num_slots, *x_BTD.shape), x_BTD.dtype) if num_slots > 1 else None
    (x_BTD, slots_SBTD), _ = lax.scan(layer, (x_BTD, slots_SBTD), (model.layers, slot_L, dropout))
    return x_BTD[None] if slots_SBTD is None else slots_SBTD


def layer_runner(config: StepConfig, rope, segments_BT):
    """(block, x_BTD, None or (keep_B, rate)) -> x_BTD after one layer, or without it for the rows
    that do not keep it."""

    def run(block, x_BTD):
        return block(x_BTD, rope, segments_BT)

    if config.remat != "none":
        policy = getattr(jax.checkpoint_policies, config.remat)
        run = jax.checkpoint(run, policy=policy, prevent_cse=False)  # the scan prevents it

    def rescaled(block, x_BTD, rate):
        y_BTD = run(block, x_BTD)
        if not config.layer_dropout.rescale:
            return y_BTD
        kept = jnp.where(rate < 1, 1 - rate, 1).astype(x_BTD.dtype)
        return x_BTD + (y_BTD - x_BTD) / kept

    def run_or_drop(block, x_BTD, dropout):
        if dropout is None:
            return run(block, x_BTD)
        keep_B, rate = dropout
        if config.layer_dropout.per_batch:
            return lax.cond(keep_B[0], partial(rescaled, block), lambda x, _: x, x_BTD, rate)
        return jnp.where(keep_B[:, None, None], rescaled(block, x_BTD, rate), x_BTD)

    return run_or_drop
