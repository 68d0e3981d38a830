"""Layer dropout: which layers each sequence skips at each step (LayerSkip, 4.1.1).

    x_{l+1} = x_l + M(p(l, t)) f_l(x_l)      M(p) = 0 with probability p, else 1     (eq. 1)
    p(l, t) = S(t) D(l) p_max                                                        (eq. 2)

The masks of a step are a function of seed, step, layer and the row's index in the batch. So they
are the same after a restart, with micro-batches, and on any mesh. Masks of `keep_counted` also
depend on which rows share a device or a micro-batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LayerDropoutConfig

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
    return draws(layer_keys(len(rates_L), seed, step), rows_B) >= rates_L[:, None]


def layer_keys(num_layers: int, seed: int, step: ArrayLike):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_layers))


def draws(
    keys_L: Array, rows_B: Int[Array, " B"], shape: tuple[int, ...] = ()
) -> Float[Array, "L B ..."]:
    """Uniform numbers from 0 to 1 of this shape for each key and row."""

    def draw(key, row):
        return jax.random.uniform(jax.random.fold_in(key, row), shape)

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys_L, rows_B)
