"""Rotary position embeddings (Su et al., 2021), in the half-split form of Llama checkpoints.

Swapping the halves by slices makes arrays of h channels, which leave half of a TPU's 128 lanes
empty. Training on TPUs multiplies by a permutation matrix instead.

Letters: h = H / 2, the number of channel pairs that rotate together.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, RopeScaling

# Sine and cosine, each [B, T, 1, h or H]; None for a layer without rope.
Rope = tuple[Array, Array] | None


def rope_frequencies(config: LlamaConfig, kind: str = "full") -> Float[np.ndarray, " h"]:
    """Radians per position of each pair of channels, after scaling; float32, as in training.

    kind: `LayerKind.rope`.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind == "window":
        theta, scaling = config.window_rope_theta, None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    # Pairs that turn often in the original context keep their frequency. Those that turn rarely
    # are slowed down, and the others are blended: by turns (llama3) or by index (yarn).
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * np.pi)
        at, ends = turns, (scaling.low_freq_factor, scaling.high_freq_factor)
    else:
        at, ends = np.arange(config.head_dim // 2), _yarn_ends(config, scaling)
    keep = np.clip((at - ends[0]) / (ends[1] - ends[0]), 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def _yarn_ends(config: LlamaConfig, scaling: RopeScaling) -> tuple[float, float]:
    """Indices of the pairs that turn beta_slow and beta_fast times in the original context."""

    def pair(turns: float) -> float:
        wavelength = scaling.original_context / (2 * math.pi * turns)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    slow, fast = pair(scaling.beta_slow), pair(scaling.beta_fast)
    if scaling.truncate:
        slow, fast = math.ceil(slow), math.floor(fast)
    slow, fast = float(min(slow, config.head_dim - 1)), float(max(fast, 0))
    return (slow + 1e-3 if slow == fast else slow), fast


def rope_angles(
    positions_BT: Int[Array, "B T"], config: LlamaConfig, dtype: DTypeLike, *, whole: bool = False
) -> Mapping[str, Rope]:
    """Sine and cosine for each position, by `LayerKind.rope`, for the kinds of the layers.

    They are in float32 or wider: bfloat16 cannot represent 257. whole: for all H channels, the
    first h sines negated; `rotate` then uses a permutation matrix.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    positions = positions_BT[:, :, None, None].astype(wide)

    def angles(kind: str) -> Rope:
        if kind == "none":
            return None
        angles = positions * rope_frequencies(config, kind).astype(wide)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        if kind == "full" and config.rope_scaling and config.rope_scaling.attention_factor != 1:
            sin, cos = (x * config.rope_scaling.attention_factor for x in (sin, cos))
        if not whole:
            return sin, cos
        return jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1)

    kinds = {config.layer_kind(layer).rope for layer in range(config.num_layers)}
    return {kind: angles(kind) for kind in sorted(kinds)}


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) by their angle; unchanged without rope."""
    if rope is None:
        return x_BTNH
    sin, cos = rope
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
