"""Rotary position embeddings (Su et al., 2021), in the half-split form of Llama checkpoints.

Swapping the halves by slices makes arrays of h channels, which leave half of a TPU's 128 lanes
empty. On TPUs training multiplies by a permutation matrix instead.

Letters: h = H / 2, the number of channel pairs that rotate together.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, RopeScaling


def rope_frequencies(config: LlamaConfig) -> Float[np.ndarray, " h"]:
    """Radians per position of each pair of channels, after scaling; float32, as in training."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    match config.rope_scaling:
        case None:
            return frequencies
        case RopeScaling(kind="linear", factor=factor):
            return frequencies / np.float32(factor)
        case scaling:
            # Llama 3.1: wavelengths above the old context / low_freq_factor are stretched by
            # factor. Those below the old context / high_freq_factor stay; the others are blended.
            turns = scaling.original_context * frequencies / (2 * np.pi)  # in the old context
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rope_angles(
    positions_BT: Int[Array, "B T"], config: LlamaConfig, dtype: DTypeLike, *, whole: bool = False
) -> tuple[Float[Array, "B T 1 hH"], Float[Array, "B T 1 hH"]]:
    """Sine and cosine for each position, in float32 or wider: bfloat16 cannot represent 257.

    whole: for all H channels, the first h sines negated; `rotate` then uses a permutation matrix.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions_BT[:, :, None, None].astype(wide) * rope_frequencies(config).astype(wide)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if not whole:
        return sin, cos
    return jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    sin: Float[Array, "B T 1 hH"],
    cos: Float[Array, "B T 1 hH"],
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) by their angle."""
    if sin.shape[-1] == x_BTNH.shape[-1]:
        return _rotate_whole(x_BTNH, sin, cos)
    first, second = jnp.split(x_BTNH.astype(sin.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


@jax.custom_vjp
def _rotate_whole(x_BTNH, sin, cos):
    """x cos + (x with its halves swapped) sin; exact, as each sum of the matmul has one term.

    The permutation has a batch axis, so that remat policies do not keep the matmul.
    """
    batch, _, _, size = x_BTNH.shape
    swap_HH = jnp.roll(jnp.eye(size, dtype=x_BTNH.dtype), size // 2, axis=0)
    swap_BHH = jnp.broadcast_to(swap_HH, (batch, size, size))
    swapped = jnp.einsum("BTNH,BHJ->BTNJ", x_BTNH, swap_BHH, precision=lax.Precision.HIGHEST)
    turned = x_BTNH.astype(sin.dtype) * cos + swapped.astype(sin.dtype) * sin
    return turned.astype(x_BTNH.dtype)


def _rotate_whole_forward(x_BTNH, sin, cos):
    return _rotate_whole(x_BTNH, sin, cos), (sin, cos)


def _rotate_whole_backward(angles, dy_BTNH):
    """Rotates back; rounds once, while autodiff would round both terms."""
    sin, cos = angles
    return _rotate_whole(dy_BTNH, -sin, cos), None, None


_rotate_whole.defvjp(_rotate_whole_forward, _rotate_whole_backward)
