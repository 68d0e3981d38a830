"""Layer dropout that computes a layer only for the rows that keep it (`skip="gather"`).

    rows of a shard      a b c d e f g h
    kept                 . b . . e f . h     their number is one of a few fixed counts
    gathered             b e f h             the layer runs on these, or is skipped if none are kept
    put back             a B c d E F g H

The count selects a branch of a conditional, so shapes are static. Putting back is a gather too:
each is the other's transpose, so neither pass needs a scatter. jax's derivative of a conditional
would keep residuals once for each branch. Here they are kept once, padded to all rows.

Letters: P shards of a batch; R rows of a shard, C of them that keep the layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.sharding import ROWS, constrain
from lsjax.training.layer_dropout import draws, layer_keys

COUNTS = 4  # row counts that a layer is compiled for, beside 0
ROUNDING = 2**31 - 1  # makes the key of the one draw that all rows share


def row_counts(rows: int) -> tuple[int, ...]:
    """Row counts that a layer is compiled for: 0, and up to COUNTS even parts of all rows."""
    parts = min(COUNTS, rows)
    return tuple(rows * part // parts for part in range(parts + 1))


def keep_counted(
    rates_L: Float[Array, " L"], seed: int, step: ArrayLike, rows_PR: Int[Array, "P R"]
) -> tuple[Bool[Array, "L P R"], Int[Array, " L"]]:
    """Layers that each row keeps, and the index of its `row_counts(R)`, which all P shards share.

    The count is (1 - p) R on average, and all sets of that many rows are equally likely. So each
    row keeps the layer with probability 1 - p. rows_PR: indices of the rows, as in `keep_mask`.
    """
    rows = rows_PR.shape[1]
    counts, keys_L = row_counts(rows), layer_keys(len(rates_L), seed, step)
    rounding_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_L, ROUNDING)
    draws_L = draws(rounding_keys, rows_PR[0, :1])[:, 0]
    which_L = stochastic_rounding((1 - rates_L) * rows, counts, draws_L)
    draws_LPR = draws(keys_L, rows_PR.reshape(-1)).reshape(-1, *rows_PR.shape)
    rank_LPR = jnp.argsort(jnp.argsort(-draws_LPR, axis=2), axis=2)  # the largest draws first
    return rank_LPR < jnp.array(counts)[which_L][:, None, None], which_L


def stochastic_rounding(
    means_L: Float[Array, " L"], counts: Sequence[int], draws_L: Float[Array, " L"]
) -> Int[Array, " L"]:
    """Index of one of the two counts around each mean; unbiased. draws_L: uniform from 0 to 1."""
    counts = jnp.array(counts)
    below_L = jnp.searchsorted(counts[1:-1], means_L, side="right")
    share_L = (means_L - counts[below_L]) / jnp.diff(counts)[below_L]
    return below_L + (draws_L < share_L)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_on_kept(
    run: Callable[[Any, Array, Any, Array], Array],
    block: Any,
    x_BTD: Float[Array, "B T D"],
    row_inputs: Any,
    rate: Float[Array, ""],
    keep_PR: Bool[Array, "P R"],
    which: Int[Array, ""],
) -> Float[Array, "B T D"]:
    """`run(block, x_BTD, row_inputs, rate)` on the rows that keep the layer, x_BTD on the others.

    run: computes each row independently, and its residuals of rows have a row axis. row_inputs:
    arrays with a leading axis B. They and the rate get no gradient. which: index in `row_counts`.
    """
    return _forward(run, block, x_BTD, row_inputs, rate, keep_PR, which)[0]


def _forward(run, block, x_BTD, row_inputs, rate, keep_PR, which):
    shards, rows = keep_PR.shape
    axes = _row_axes(run, shards, rows, block, x_BTD, row_inputs, rate)

    def computed(count: int):
        x, own = jax.tree.map(lambda leaf: _gather(leaf, keep_PR, count), (x_BTD, row_inputs))
        y, pullback = jax.vjp(lambda block, x: run(block, x, own, rate), block, x)
        leaves = zip(jax.tree.leaves(pullback), axes, strict=True)
        saved = [_resized(leaf, at, shards, count, rows) for leaf, at in leaves if at is not None]
        return _put_back(y, x_BTD, keep_PR), saved

    _, shapes = jax.eval_shape(partial(computed, rows))

    def skipped():
        return x_BTD, jax.tree.map(jnp.zeros_like, shapes)

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    y_BTD, saved = lax.switch(which, branches)
    return y_BTD, (saved, block, row_inputs, rate, keep_PR, which)


def _backward(run, residuals, dy_BTD):
    saved, block, row_inputs, rate, keep_PR, which = residuals
    shards, rows = keep_PR.shape
    axes = _row_axes(run, shards, rows, block, dy_BTD, row_inputs, rate)

    def computed(count: int):
        # Residuals that depend on parameters only are made again, from zeros. The compiler removes
        # what else is computed on zeros.
        pullback = _pullback_of_zeros(run, shards * count, block, dy_BTD, row_inputs, rate)
        leaves, structure = jax.tree.flatten(pullback)
        of_rows = iter(saved)
        leaves = [
            leaf if axis is None else _resized(next(of_rows), axis, shards, rows, count)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        pullback = jax.tree.unflatten(structure, leaves)
        dblock, dx = pullback(_gather(dy_BTD, keep_PR, count))
        return dblock, _put_back(dx, dy_BTD, keep_PR)

    def skipped():
        return jax.tree.map(jnp.zeros_like, block), dy_BTD

    branches = [partial(computed, count) if count else skipped for count in row_counts(rows)]
    return *lax.switch(which, branches), None, None, None, None


run_on_kept.defvjp(_forward, _backward)


def _pullback_of_zeros(run, rows: int, block, x_BTD, row_inputs, rate):
    """The pullback of `run` on that many rows of zeros."""
    x_BTD, row_inputs = jax.tree.map(
        lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), (x_BTD, row_inputs)
    )
    return jax.vjp(lambda block, x: run(block, x, row_inputs, rate), block, x_BTD)[1]


def _row_axes(run, shards: int, rows: int, *arguments) -> list[int | None]:
    """The axis of each residual that grows with the rows, or None. A pullback of jax.vjp is a
    pytree, and its leaves are the residuals. It is traced for R and R + 1 rows: the axis whose size
    differs is that of the rows."""

    def shapes(rows: int) -> list[tuple[int, ...]]:
        pullback = jax.eval_shape(partial(_pullback_of_zeros, run, rows), *arguments)
        return [leaf.shape for leaf in jax.tree.leaves(pullback)]

    return [
        next((axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b), None)
        for few, more in zip(shapes(shards * rows), shapes(shards * (rows + 1)), strict=True)
    ]


def _resized(leaf: Array, axis: int, shards: int, rows: int, wanted: int) -> Array:
    """The leaf with its axis of P * rows cut or padded in each shard to P * wanted."""
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


def _gather(x: Array, keep_PR: Bool[Array, "P R"], count: int) -> Array:
    """The rows that are kept, in order: [B, ...] -> [P * C, ...]."""
    if count == keep_PR.shape[1]:
        return x
    return _taken(x, jnp.argsort(~keep_PR, axis=1, stable=True)[:, :count])


def _put_back(y: Array, x: Array, keep_PR: Bool[Array, "P R"]) -> Array:
    """Kept rows from y, [P * C, ...], the others from x, [B, ...]."""
    if len(y) == len(x):
        return y
    at_PR = jnp.maximum(jnp.cumsum(keep_PR, axis=1) - 1, 0)
    keep_B = keep_PR.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep_B, _taken(y, at_PR), x)


def _taken(x: Array, at_PC: Int[Array, "P C"]) -> Array:
    """Rows of each shard, by index within the shard; x: [B, T, ...]."""
    x = constrain(x.reshape(len(at_PC), -1, *x.shape[1:]), ROWS, None, "context")
    at = at_PC.reshape(*at_PC.shape, *[1] * (x.ndim - 2))
    taken = jnp.take_along_axis(x, at, axis=1, mode="promise_in_bounds")
    return constrain(taken.reshape(-1, *x.shape[2:]), ROWS, "context")
