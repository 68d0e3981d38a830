"""Layers in training: a scan over stacked blocks with layer dropout, and the outputs of the exits
in the loss.

If rows skip layers by `gather`, a layer is computed only for the rows that keep it:

    rows of a shard      a b c d e f g h
    kept                 . b . . e f . h     their number is one of a few fixed counts
    gathered             b e f h             the layer runs on these, or is skipped if none are kept
    put back             a B c d E F g H

The count selects a branch of a conditional, so shapes are static. Putting back is a gather too:
each is the other's transpose, so neither pass needs a scatter. jax's derivative of a conditional
would keep residuals once for each branch. Here they are kept once, padded to all rows.

Letters: S exit slots, or shards of a batch; R rows of a shard, C of them that keep the layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig
from lsjax.kernels.flash_sizes import SAVED
from lsjax.kernels.rope import Rope, for_training
from lsjax.model.block import ADAPTED, HEADS, MIDDLE
from lsjax.model.llama import Llama
from lsjax.model.rope import rope_angles
from lsjax.sharding import ROWS, constrain, over_context, row_shards
from lsjax.training.layer_dropout import DropRates, keep_counted, keep_mask, row_counts

_jax = jax.checkpoint_policies
# To a policy that keeps matmuls, the attention kernel's output counts as one.
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
    exit_S: Int[Array, " S"],
    drop_rates: DropRates,
) -> Float[Array, "S B T D"]:
    """Outputs of the layers exit_S, in order; the last slot is the model's output.

    model: stacked, in the dtype of the computation. rows_B: indices of the rows in the step's
    batch. exit_S: each layer but the last at most once. Slots of L - 1 before the last slot are
    unused. At most S outputs are in memory: each is written to its slot, or S = L.
    """
    num_slots, num_layers, batch = len(exit_S), model.config.num_layers, over_context(batch)
    x_BTD = model.embed_rows(batch["tokens_BT"])
    ropes = for_training(rope_angles(batch["positions_BT"], model.config, x_BTD.dtype))
    run = layer_runner(config, ropes, batch["segments_BT"])
    picks = 1 < num_slots < num_layers
    # Slot of the exit below each layer; without an exit the last slot, which is not read.
    slot_L = jnp.full(num_layers + 1, num_slots - 1).at[exit_S + 1].set(jnp.arange(num_slots))[:-1]
    dropout = None
    if config.layer_dropout.p_max > 0:
        rates_L = drop_rates(config.layer_dropout, num_layers, step, config.num_steps)
        match config.layer_dropout.skip:
            case "mask":
                kept = keep_mask(rates_L, config.seed, step, rows_B)
            case "batch":  # one mask for all rows
                kept = keep_mask(rates_L, config.seed, step, jnp.zeros_like(rows_B[:1]))[:, 0]
            case "gather":
                rows_SR = rows_B.reshape(row_shards(len(rows_B)), -1)
                kept = keep_counted(rates_L, config.seed, step, rows_SR)
        dropout = rates_L, kept

    def run_layer(block, x_BTD, inputs, kind):
        return run(block, x_BTD, inputs[1], kind)

    def look(slots, x_BTD, y_BTD, inputs):
        if picks:
            slots = lax.dynamic_update_index_in_dim(slots, x_BTD, inputs[0], 0)
        return slots, y_BTD if num_slots == num_layers else None

    slots = None
    if picks:  # XLA:GPU would merge zeros with those of the loss, and keep them until then
        slots = jnp.broadcast_to(lax.stop_gradient(x_BTD), (num_slots, *x_BTD.shape))
    x_BTD, slots, x_LBTD = model.scan_layers(x_BTD, run_layer, look, slots, (slot_L, dropout))
    if num_slots == num_layers:
        return x_LBTD
    return jnp.concatenate([slots[:-1], x_BTD[None]]) if picks else x_BTD[None]


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
        # The scan prevents common subexpressions.
        run = jax.checkpoint(run, policy=POLICIES[remat], prevent_cse=False, static_argnums=0)

    def run_or_drop(block, x_BTD, rate_and_kept, kind):
        run_kind, others = partial(run, kind.window), (ropes[kind.rope], segments_BT)
        rate, kept = rate_and_kept or (None, None)
        if rate is None or dropout.skip == "mask":
            return run_kind(block, x_BTD, others, rate, kept)
        if dropout.skip == "gather":
            return run_on_kept(run_kind, block, x_BTD, others, rate, *kept)
        run_all = partial(run_kind, block, others=others, rate=rate)
        return lax.cond(kept, run_all, lambda x: x, x_BTD)

    return run_or_drop


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_on_kept(
    run: Callable[[Any, Array, Any, Array], Array],
    block: Any,
    x_BTD: Float[Array, "B T D"],
    others: Any,
    rate: Float[Array, ""],
    keep_SR: Bool[Array, "S R"],
    which: Int[Array, ""],
) -> Float[Array, "B T D"]:
    """`run(block, x_BTD, others, rate)` on the rows that keep the layer, x_BTD on the others.

    run: computes each row independently, and its residuals of rows have a row axis. others: arrays
    with a leading axis B. They and the rate get no gradient. which: index in `row_counts`.
    """
    return _forward(run, block, x_BTD, others, rate, keep_SR, which)[0]


def _forward(run, block, x_BTD, others, rate, keep_SR, which):
    shards, rows = keep_SR.shape
    axes = _row_axes(run, shards, rows, block, x_BTD, others, rate)

    def computed(count: int):
        x, own = jax.tree.map(lambda leaf: _gather(leaf, keep_SR, count), (x_BTD, others))
        y, pullback = jax.vjp(lambda block, x: run(block, x, own, rate), block, x)
        leaves = zip(jax.tree.leaves(pullback), axes, strict=True)
        saved = [_resized(leaf, at, shards, count, rows) for leaf, at in leaves if at is not None]
        return _put_back(y, x_BTD, keep_SR), saved

    _, shapes = jax.eval_shape(partial(computed, rows))

    def skipped():
        return x_BTD, jax.tree.map(jnp.zeros_like, shapes)

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    y_BTD, saved = lax.switch(which, branches)
    return y_BTD, (saved, block, others, rate, keep_SR, which)


def _backward(run, residuals, dy_BTD):
    saved, block, others, rate, keep_SR, which = residuals
    shards, rows = keep_SR.shape
    axes = _row_axes(run, shards, rows, block, dy_BTD, others, rate)

    def computed(count: int):
        # The compiler removes the computation on zeros. Only residuals of parameters are used.
        pullback = _pullback_of_zeros(run, shards * count, block, dy_BTD, others, rate)
        leaves, structure = jax.tree.flatten(pullback)
        of_rows = iter(saved)
        leaves = [
            leaf if axis is None else _resized(next(of_rows), axis, shards, rows, count)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        pullback = jax.tree.unflatten(structure, leaves)
        dblock, dx = pullback(_gather(dy_BTD, keep_SR, count))
        return dblock, _put_back(dx, dy_BTD, keep_SR)

    def skipped():
        return jax.tree.map(jnp.zeros_like, block), dy_BTD

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    return *lax.switch(which, branches), None, None, None, None


run_on_kept.defvjp(_forward, _backward)


def _pullback_of_zeros(run, rows: int, block, x_BTD, others, rate):
    """The pullback of `run` on that many rows of zeros."""
    x_BTD, others = jax.tree.map(
        lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), (x_BTD, others)
    )
    return jax.vjp(lambda block, x: run(block, x, others, rate), block, x_BTD)[1]


def _row_axes(run, shards: int, rows: int, *arguments) -> list[int | None]:
    """The axis of each residual that grows with the rows, or None."""

    def shapes(rows: int) -> list[tuple[int, ...]]:
        pullback = jax.eval_shape(partial(_pullback_of_zeros, run, rows), *arguments)
        return [leaf.shape for leaf in jax.tree.leaves(pullback)]

    return [
        next((axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b), None)
        for few, more in zip(shapes(shards * rows), shapes(shards * (rows + 1)), strict=True)
    ]


def _resized(leaf: Array, axis: int, shards: int, rows: int, wanted: int) -> Array:
    """The leaf with its axis of S * rows cut or padded in each shard to S * wanted."""
    if rows == wanted:
        return leaf
    lead, tail = leaf.shape[:axis], leaf.shape[axis + 1 :]
    old = leaf.shape[axis] // shards
    new = old * wanted // rows  # the axis may combine rows with other axes
    leaf = leaf.reshape(*lead, shards, old, *tail)
    if new < old:
        leaf = lax.slice_in_dim(leaf, 0, new, axis=axis + 1)
    else:
        leaf = jnp.pad(leaf, [(0, (new - old) * (at == axis + 1)) for at in range(leaf.ndim)])
    return leaf.reshape(*lead, shards * new, *tail)


def _gather(x: Array, keep_SR: Bool[Array, "S R"], count: int) -> Array:
    """The rows that are kept, in order: [B, ...] -> [S * C, ...]."""
    if count == keep_SR.shape[1]:
        return x
    return _taken(x, jnp.argsort(~keep_SR, axis=1, stable=True)[:, :count])


def _put_back(y: Array, x: Array, keep_SR: Bool[Array, "S R"]) -> Array:
    """Kept rows from y, [S * C, ...], the others from x, [B, ...]."""
    if len(y) == len(x):
        return y
    at_SR = jnp.maximum(jnp.cumsum(keep_SR, axis=1) - 1, 0)
    keep_B = keep_SR.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep_B, _taken(y, at_SR), x)


def _taken(x: Array, at_SC: Int[Array, "S C"]) -> Array:
    """Rows of each shard, by index within the shard; x: [B, T, ...]."""
    x = constrain(x.reshape(len(at_SC), -1, *x.shape[1:]), ROWS, None, "context")
    at = at_SC.reshape(*at_SC.shape, *[1] * (x.ndim - 2))
    taken = jnp.take_along_axis(x, at, axis=1, mode="promise_in_bounds")
    return constrain(taken.reshape(-1, *x.shape[2:]), ROWS, "context")
