"""Rotary embeddings (Su et al., 2021). They turn channel pairs (i, i + H/2), as Llama checkpoints
do; h = H / 2."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, RopeScaling
from lsjax.kernels.rope import Rope


def rope_frequencies(config: LlamaConfig, kind: str = "full") -> Float[np.ndarray, " h"]:
    """Radians per position of each pair of channels, after scaling; float32, as in training. kind:
    `LayerKind.rope`."""
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
    turns = np.array([scaling.beta_slow, scaling.beta_fast])
    wavelengths = scaling.original_context / (2 * np.pi * turns)
    slow, fast = config.head_dim * np.log(wavelengths) / (2 * np.log(config.rope_theta))
    if scaling.truncate:
        slow, fast = np.ceil(slow), np.floor(fast)
    slow, fast = min(slow, config.head_dim - 1.0), max(fast, 0.0)
    return (slow + 1e-3 if slow == fast else slow), fast


def rope_angles(
    positions_BT: Int[Array, "B T"], config: LlamaConfig, dtype: DTypeLike
) -> Mapping[str, Rope]:
    """Sine and cosine for each position, by `LayerKind.rope`, for the kinds of the layers. They are
    in float32 or wider: bfloat16 cannot represent 257."""
    wide = jnp.promote_types(dtype, jnp.float32)
    positions = positions_BT[:, :, None, None].astype(wide)

    def angles(kind: str) -> Rope:
        if kind == "none":
            return None
        angles = positions * rope_frequencies(config, kind).astype(wide)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        if kind == "full" and config.rope_scaling and config.rope_scaling.attention_factor != 1:
            sin, cos = (x * config.rope_scaling.attention_factor for x in (sin, cos))
        return sin, cos

    kinds = {config.layer_kind(layer).rope for layer in range(config.num_layers)}
    return {kind: angles(kind) for kind in sorted(kinds)}


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) by their angle; unchanged without rope."""
    if rope is None:
        return x_BTNH
    sin, cos = rope
    first, second = jnp.split(x_BTNH.astype(sin.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
