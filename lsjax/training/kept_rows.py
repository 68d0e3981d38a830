"""Computes a layer only for the rows that keep it: gathers them, runs it, and puts them back.

    rows of a shard      a b c d e f g h
    kept                 . b . . e f . h     their number is one of a few fixed counts
    gathered             b e f h             the layer runs on these, or is skipped if none are kept
    put back             a B c d E F g H

The count selects a branch of a conditional, so shapes are static. Rows are gathered within each
shard. Putting back is a gather too. Each gather is the other's transpose, so neither pass needs a
scatter.

jax's derivative of a conditional would keep residuals once for each branch. Here they are kept
once, padded to all rows. Residuals without a row axis are recomputed from the block's parameters.

Letters: S shards, R rows of a shard, C of them that keep the layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.sharding import ROWS, constrain
from lsjax.training.layer_dropout import row_counts


class Kept(NamedTuple):
    """Rows that keep the layer."""

    keep_SR: Bool[Array, "S R"]
    which: Int[Array, ""]  # index in `row_counts` of the count per shard


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_on_kept(
    run: Callable[[Any, Array, Any, Array], Array],
    block: Any,
    x_BTD: Float[Array, "B T D"],
    others: Any,
    rate: Float[Array, ""],
    kept: Kept,
) -> Float[Array, "B T D"]:
    """`run(block, x_BTD, others, rate)` on the rows that keep the layer, x_BTD on the others.

    run: computes each row independently. Residuals of its backward pass that depend on the rows
    have a row axis. others: arrays with a leading axis B. They and the rate get no gradient.
    """
    return _forward(run, block, x_BTD, others, rate, kept)[0]


def _forward(run, block, x_BTD, others, rate, kept):
    shards, rows = kept.keep_SR.shape
    axes = _row_axes(run, shards, rows, block, x_BTD, others, rate)

    def computed(count: int, block, x_BTD, others, rate, keep_SR):
        gather = partial(_gather, keep_SR=keep_SR, count=count)
        y, pullback = jax.vjp(
            lambda block, x: run(block, x, jax.tree.map(gather, others), rate),
            block,
            gather(x_BTD),
        )
        saved = [
            _resized(leaf, axis, shards, count, rows)
            for leaf, axis in zip(jax.tree.leaves(pullback), axes, strict=True)
            if axis is not None
        ]
        return _put_back(y, x_BTD, keep_SR), saved

    operands = block, x_BTD, others, rate, kept.keep_SR
    _, shapes = jax.eval_shape(partial(computed, rows), *operands)

    def skipped(block, x_BTD, *_):
        return x_BTD, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    y_BTD, saved = lax.switch(kept.which, branches, *operands)
    return y_BTD, (saved, block, others, rate, kept)


def _backward(run, residuals, dy_BTD):
    saved, block, others, rate, kept = residuals
    shards, rows = kept.keep_SR.shape
    axes = _row_axes(run, shards, rows, block, dy_BTD, others, rate)

    def computed(count: int, saved, block, others, rate, dy_BTD, keep_SR):
        # The compiler removes the computation on zeros, because nothing uses its values.
        pullback = _pullback_of_zeros(run, shards * count, block, dy_BTD, others, rate)
        leaves, structure = jax.tree.flatten(pullback)
        saved = iter(saved)
        leaves = [
            leaf if axis is None else _resized(next(saved), axis, shards, rows, count)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        pullback = jax.tree.unflatten(structure, leaves)
        dblock, dx = pullback(_gather(dy_BTD, keep_SR, count))
        return dblock, _put_back(dx, dy_BTD, keep_SR)

    def skipped(saved, block, others, rate, dy_BTD, keep_SR):
        return jax.tree.map(jnp.zeros_like, block), dy_BTD

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    operands = saved, block, others, rate, dy_BTD, kept.keep_SR
    dblock, dx_BTD = lax.switch(kept.which, branches, *operands)
    return dblock, dx_BTD, None, None, None


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
    shards, rows = keep_SR.shape
    if count == rows:
        return x
    at_SC = jnp.argsort(~keep_SR, axis=1, stable=True)[:, :count]
    return _taken(x, at_SC)


def _put_back(y: Array, x: Array, keep_SR: Bool[Array, "S R"]) -> Array:
    """Kept rows from y, [S * C, ...], the others from x, [B, ...]."""
    if len(y) == len(x):
        return y
    at_SR = jnp.maximum(jnp.cumsum(keep_SR, axis=1) - 1, 0)
    keep_B = keep_SR.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep_B, _taken(y, at_SR), x)


def _taken(x: Array, at_SC: Int[Array, "S C"]) -> Array:
    """Rows of each shard, by index within the shard; x: [B, T, ...]."""
    shards = len(at_SC)
    x = constrain(x.reshape(shards, -1, *x.shape[1:]), ROWS, None, "context")
    at = at_SC.reshape(*at_SC.shape, *[1] * (x.ndim - 2))
    taken = jnp.take_along_axis(x, at, axis=1, mode="promise_in_bounds")
    return constrain(taken.reshape(-1, *x.shape[2:]), ROWS, "context")
