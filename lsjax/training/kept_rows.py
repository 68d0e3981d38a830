"""A layer computed only for the rows that keep it: gathered, run, and put back.

    rows of a shard      a b c d e f g h
    kept                 . b . . e f . h     as many as one of a few fixed counts
    gathered             b e f h             the layer runs on these, or is skipped if they are none
    put back             a B c d E F g H

The count chooses a branch of a conditional, so shapes are static. Rows are gathered within each
shard, and kept rows stay in their order. Putting back is a gather too, of the row that each place
takes, and each is the other's transpose: there is no scatter, forward or backward.

The derivative is written out because jax's own, of a conditional, keeps what the backward pass
needs once for each branch. Here it is kept once, padded to all rows.

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

# (block, x_BTD, other arrays with an axis B in front, rate) -> x_BTD, each row by itself
Run = Callable[[Any, Array, Any, Array], Array]


class Kept(NamedTuple):
    """Which rows keep the layer."""

    keep_SR: Bool[Array, "S R"]
    which: Int[Array, ""]  # of the counts, how many they are in each shard


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_on_kept(
    run: Run,
    counts: tuple[int, ...],
    block: Any,
    x_BTD: Float[Array, "B T D"],
    others: Any,
    rate: Float[Array, ""],
    kept: Kept,
) -> Float[Array, "B T D"]:
    """`run` on the rows that keep the layer; the others stay as they are.

    counts: numbers of rows of a shard that there can be, all of them last. Nothing flows back to
    others and rate. What `run` keeps for its backward pass of the rows must have an axis of them.
    """
    return _forward(run, counts, block, x_BTD, others, rate, kept)[0]


def _forward(run, counts, block, x_BTD, others, rate, kept):
    shards, rows = kept.keep_SR.shape
    residuals = _Residuals(run, block, x_BTD, others, rate, shards)

    def branch(count: int):
        def computed(block, x_BTD, others, rate, keep_SR):
            if count == 0:
                return x_BTD, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in residuals.padded(rows)]
            gather = partial(_gather, keep_SR=keep_SR, count=count)
            y, pullback = jax.vjp(
                lambda block, x: run(block, x, jax.tree.map(gather, others), rate),
                block,
                gather(x_BTD),
            )
            return _put_back(y, x_BTD, keep_SR), residuals.pad(pullback, rows)

        return computed

    operands = (block, x_BTD, others, rate, kept.keep_SR)
    y_BTD, saved = lax.switch(kept.which, [branch(count) for count in counts], *operands)
    return y_BTD, (saved, block, others, rate, kept)


def _backward(run, counts, residuals, dy_BTD):
    saved, block, others, rate, kept = residuals
    residuals = _Residuals(run, block, dy_BTD, others, rate, kept.keep_SR.shape[0])

    def branch(count: int):
        def computed(saved, block, others, rate, dy_BTD, keep_SR):
            if count == 0:
                return jax.tree.map(jnp.zeros_like, block), dy_BTD
            pullback = residuals.pullback(saved, block, others, rate, count)
            dblock, dx = pullback(_gather(dy_BTD, keep_SR, count))
            return dblock, _put_back(dx, dy_BTD, keep_SR)

        return computed

    operands = (saved, block, others, rate, dy_BTD, kept.keep_SR)
    dblock, dx_BTD = lax.switch(kept.which, [branch(count) for count in counts], *operands)
    return dblock, dx_BTD, None, None, None


run_on_kept.defvjp(_forward, _backward)


class _Residuals:
    """What `run` keeps of its rows for the backward pass, in arrays that fit any number of rows.

    The rest, which does not depend on the rows, is not kept: it is computed again from the block's
    parameters, most often these themselves.
    """

    def __init__(self, run: Run, block, x_BTD, others, rate, shards: int):
        self._run, self._shards = run, shards
        self._shapes = jax.eval_shape(lambda *a: a, block, x_BTD, others, rate)
        rows = len(x_BTD) // shards
        # Axes of rows are those that grow with them.
        sizes = zip(self._leaves(rows), self._leaves(rows + 1), strict=True)
        self._axes = [
            next(
                (i for i, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b),
                None,
            )
            for few, more in sizes
        ]

    def _vjp(self, block, others, rate, count: int):
        """The pullback for that many rows, computed from zeros."""

        def zeros(leaf):
            return jnp.zeros((self._shards * count, *leaf.shape[1:]), leaf.dtype)

        _, x_BTD, others, _ = self._shapes
        others = jax.tree.map(zeros, others)
        return jax.vjp(lambda block, x: self._run(block, x, others, rate), block, zeros(x_BTD))[1]

    def _leaves(self, count: int) -> list[jax.ShapeDtypeStruct]:
        block, _, others, rate = self._shapes
        return jax.tree.leaves(
            jax.eval_shape(lambda b, o, r: self._vjp(b, o, r, count), block, others, rate)
        )

    def padded(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what is kept."""
        return [
            leaf
            for leaf, axis in zip(self._leaves(rows), self._axes, strict=True)
            if axis is not None
        ]

    def pad(self, pullback, rows: int) -> list[Array]:
        """What is kept, of a pullback for some of the rows."""
        leaves = zip(jax.tree.leaves(pullback), self._axes, strict=True)
        kept = [(leaf, axis) for leaf, axis in leaves if axis is not None]
        return [
            self._resized(leaf, axis, want.shape[axis])
            for (leaf, axis), want in zip(kept, self.padded(rows), strict=True)
        ]

    def pullback(self, saved: list[Array], block, others, rate, count: int):
        """The pullback again: the compiler drops the computation on zeros, of which nothing that
        depends on them is used."""
        leaves, structure = jax.tree.flatten(self._vjp(block, others, rate, count))
        kept = iter(saved)
        leaves = [
            leaf if axis is None else self._resized(next(kept), axis, leaf.shape[axis])
            for leaf, axis in zip(leaves, self._axes, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    def _resized(self, leaf: Array, axis: int, size: int) -> Array:
        """Each shard's part of an axis of rows cut or padded, so that the axis has this size."""
        old, new = leaf.shape[axis] // self._shards, size // self._shards
        if old == new:
            return leaf
        lead, tail = leaf.shape[:axis], leaf.shape[axis + 1 :]
        leaf = leaf.reshape(*lead, self._shards, old, *tail)
        if new < old:
            leaf = lax.slice_in_dim(leaf, 0, new, axis=axis + 1)
        else:
            widths = [(0, 0)] * leaf.ndim
            widths[axis + 1] = (0, new - old)
            leaf = jnp.pad(leaf, widths)
        return leaf.reshape(*lead, size, *tail)


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
    """Rows of each shard by their numbers there."""
    shards = len(at_SC)
    x = constrain(x.reshape(shards, -1, *x.shape[1:]), ROWS)
    at = at_SC.reshape(*at_SC.shape, *[1] * (x.ndim - 2))
    taken = jnp.take_along_axis(x, at, axis=1, mode="promise_in_bounds")
    return constrain(taken.reshape(-1, *x.shape[2:]), ROWS)
