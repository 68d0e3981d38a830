"""Layer dropout: which layers each sequence skips at each step (LayerSkip, 4.1.1).

    x_{l+1} = x_l + M(p(l, t)) f_l(x_l)      M(p) = 0 with probability p, else 1     (eq. 1)
    p(l, t) = S(t) D(l) p_max                                                        (eq. 2)

The masks of a step are a function of seed, step, layer and the row's index in the batch. So they
are the same after a restart, with micro-batches, and on any mesh. Masks of `keep_counted` also
depend on which rows share a device or a micro-batch.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LayerDropoutConfig

COUNTS = 4  # row counts that a layer is compiled for, beside 0
ROUNDING = 2**31 - 1  # makes the key of the one draw that all rows share

# (config, num_layers, step, num_steps) -> the rate of each layer
DropRates = Callable[[LayerDropoutConfig, int, ArrayLike, int], Float[Array, " L"]]


def drop_rates(
    config: LayerDropoutConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> Float[Array, " L"]:
    """p(l, t): the rate at which each layer is skipped at step t of T (eq. 2)."""
    return layer_rates(config, num_layers) * time_scale(config, step, num_steps)


def layer_rates(config: LayerDropoutConfig, num_layers: int) -> Float[np.ndarray, " L"]:
    """D(l) p_max (eq. 3); 0 for layers that are never skipped."""
    config.check_layers(num_layers)
    depth = np.arange(num_layers) / (num_layers - 1) if num_layers > 1 else np.ones(1)
    match config.distribution:
        case "exponential":
            scale = np.exp2(depth) - 1
        case "linear":
            scale = depth
        case "uniform":
            scale = np.ones(num_layers)
    if config.layers is not None:
        scale = np.where(np.isin(np.arange(num_layers), config.layers), scale, 0)
    return (config.p_max * scale).astype(np.float32)


def time_scale(config: LayerDropoutConfig, step: ArrayLike, num_steps: int) -> Float[Array, ""]:
    """S(t) (eq. 4 and other schedules); 1 for a run of one step."""
    if num_steps == 1:
        return jnp.float32(1)
    step = jnp.asarray(step, jnp.float32)
    elapsed = step / (num_steps - 1)
    match config.schedule:
        case "constant":
            return jnp.float32(1)
        case "exponential":
            return jnp.exp2(elapsed) - 1
        case "decreasing":
            return 1 - elapsed
        case "saturating":
            return -jnp.expm1(-(config.gamma or 100 / num_steps) * step)


def keep_mask(
    rates_L: Float[Array, " L"], seed: int, step: ArrayLike, rows_B: Int[Array, " B"]
) -> Bool[Array, "L B"]:
    """Layers that each row keeps. rows_B: indices of the rows in the step's complete batch."""
    return draws(_layer_keys(len(rates_L), seed, step), rows_B) >= rates_L[:, None]


def row_counts(rows: int) -> tuple[int, ...]:
    """Row counts that a layer is compiled for: 0, and up to COUNTS even parts of all rows."""
    parts = min(COUNTS, rows)
    return tuple(rows * part // parts for part in range(parts + 1))


def keep_counted(
    rates_L: Float[Array, " L"], seed: int, step: ArrayLike, rows_SR: Int[Array, "S R"]
) -> tuple[Bool[Array, "L S R"], Int[Array, " L"]]:
    """Layers that each row keeps, and the index of its `row_counts(R)`, which all S shards share.

    The count is (1 - p) R on average, and all sets of that many rows are equally likely. So each
    row keeps the layer with probability 1 - p. rows_SR: indices of the rows, as in `keep_mask`.
    """
    rows = rows_SR.shape[1]
    counts, layer_keys = row_counts(rows), _layer_keys(len(rates_L), seed, step)
    rounding_keys = jax.vmap(jax.random.fold_in, (0, None))(layer_keys, ROUNDING)
    draws_L = draws(rounding_keys, rows_SR[0, :1])[:, 0]
    which_L = stochastic_rounding((1 - rates_L) * rows, counts, draws_L)
    draws_LSR = draws(layer_keys, rows_SR.reshape(-1)).reshape(-1, *rows_SR.shape)
    rank_LSR = jnp.argsort(jnp.argsort(-draws_LSR, axis=2), axis=2)  # the largest draws first
    return rank_LSR < jnp.array(counts)[which_L][:, None, None], which_L


def stochastic_rounding(
    means_L: Float[Array, " L"], counts: Sequence[int], draws_L: Float[Array, " L"]
) -> Int[Array, " L"]:
    """Index of one of the two counts around each mean; unbiased. draws_L: uniform from 0 to 1."""
    counts = jnp.array(counts)
    below_L = jnp.searchsorted(counts[1:-1], means_L, side="right")
    share_L = (means_L - counts[below_L]) / jnp.diff(counts)[below_L]
    return below_L + (draws_L < share_L)


def _layer_keys(num_layers: int, seed: int, step: ArrayLike):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_layers))


def draws(
    keys_L: Array, rows_B: Int[Array, " B"], shape: tuple[int, ...] = ()
) -> Float[Array, "L B ..."]:
    """Uniform numbers from 0 to 1 of this shape for each key and row."""

    def draw(key, row):
        return jax.random.uniform(jax.random.fold_in(key, row), shape)

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys_L, rows_B)
