"""Operations of a layer: products, SwiGLU and rotary embeddings (Su et al., 2021).

Custom backward passes are faster or smaller than autodiff's (docs/performance.md). Each gives the
gradients of the plain expression in the docstring, up to rounding. They have no forward-mode
derivative.

Rotary embeddings turn channel pairs (i, i + H/2), as Llama checkpoints do. Swapping the halves by
slices makes arrays of h = H / 2 channels. `rotates_by_matmul` multiplies by a permutation matrix
instead.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, RopeScaling
from lsjax.platforms import tuning

# Sine and cosine, each [B, T, 1, h or H]; None for a layer without rope.
Rope = tuple[Array, Array] | None

# Tokens per block of flash.py; must divide the sequence length.
FLASH_BLOCK = 128
# Name of the residuals of splash and flash, for remat policies.
SAVED = "attention"


def enough_steps(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
    """Appends zero steps, so that B * U is at least the platform's `layer_rows`."""
    batch, steps, _ = x_BTD.shape
    return with_steps(x_BTD, max(steps, -(-tuning().layer_rows // batch)))


def with_steps(x: Float[Array, "B T *rest"], steps: int) -> Float[Array, "B U *rest"]:
    """x with zero steps appended, up to `steps`."""
    more = steps - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


def enough_rows(x: Float[Array, "*batch R I"]) -> Float[Array, "*batch S I"]:
    """x as the left side of a matmul, with zero rows appended up to the platform's `left_rows`. The
    barrier keeps XLA from removing them."""
    missing = tuning().left_rows - x.shape[-2]
    if missing <= 0:
        return x
    return lax.optimization_barrier(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*batch I"], w: Float[Array, "I *O"], again: bool = False
) -> Float[Array, "..."]:
    """tensordot(x, w, 1): [*batch, *O]. The gradient of w has the layout of w, [I, *O]; autodiff
    would transpose it in every layer. again: a layer under remat recomputes the matmul instead of
    keeping it. A batch axis of size 1 has this effect under dots_with_no_batch_dims_saveable."""
    return _linear_forward(x, w, again)[0]


def _linear_forward(x, w, again):
    if again:
        y = lax.dot_general(x[None], w[None], (((x.ndim,), (1,)), ((0,), (0,))))[0]
    else:
        y = jnp.tensordot(x, w, axes=1)
    return y, (x, w)


def _linear_backward(again, residuals, dy):
    x, w = residuals
    rows, outputs = tuple(range(x.ndim - 1)), w.ndim - 1
    over_outputs = tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(1, w.ndim))
    dx = lax.dot_general(dy, w, (over_outputs, ((), ())))
    dw = lax.dot_general(x, dy, ((rows, rows), ((), ())))
    return dx, dw


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gradients_first(x: Any, parameters: Any) -> tuple[Any, Any]:
    """Returns both unchanged. With `parameters_first`, the gradients of the parameters are computed
    before that of x."""
    return x, parameters


def _gradients_first_backward(_, gradients):
    return lax.optimization_barrier(gradients) if tuning().parameters_first else gradients


gradients_first.defvjp(lambda *both: (both, None), _gradients_first_backward)


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*batch 2 F"] | tuple[Array, Array]) -> Float[Array, "*batch F"]:
    """silu(gate) * up (Shazeer, 2020); gate and up as one array, or apart (`split_matrices`). Keeps
    only its input for the backward pass, and writes the gradient once. If they are apart, barriers
    keep XLA from fusing it into matmuls, which would be slower on TPUs."""
    gate, up = _halves(gate_up)
    y = jax.nn.silu(gate) * up
    return lax.optimization_barrier(y) if isinstance(gate_up, tuple) else y


def _halves(gate_up):
    return gate_up if isinstance(gate_up, tuple) else (gate_up[..., 0, :], gate_up[..., 1, :])


def _swiglu_backward(gate_up, dy):
    gate, up = _halves(gate_up)
    apart = isinstance(gate_up, tuple)
    dy = lax.optimization_barrier(dy) if apart else dy
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup = dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu
    if apart:
        return (lax.optimization_barrier((dgate, dup)),)
    if tuning().stacks_gradients:
        return (jnp.stack([dgate, dup], -2),)
    is_gate = jnp.arange(2)[:, None] == 0
    return (jnp.where(is_gate, dgate[..., None, :], dup[..., None, :]),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)


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
    positions_BT: Int[Array, "B T"], config: LlamaConfig, dtype: DTypeLike, *, whole: bool = False
) -> Mapping[str, Rope]:
    """Sine and cosine for each position, by `LayerKind.rope`, for the kinds of the layers. They are
    in float32 or wider: bfloat16 cannot represent 257. whole: for all H channels, the first h sines
    negated; `rotate` then uses a permutation matrix."""
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
    """x cos + (x with its halves swapped) sin; exact, as each sum of the matmul has one term. The
    permutation has a batch axis, so that remat policies do not keep the matmul."""
    batch, _, _, size = x_BTNH.shape
    swap_HH = jnp.roll(jnp.eye(size, dtype=x_BTNH.dtype), size // 2, axis=0)
    swap_BHH = jnp.broadcast_to(swap_HH, (batch, size, size))
    swapped = jnp.einsum("BTNH,BHJ->BTNJ", x_BTNH, swap_BHH, precision=lax.Precision.HIGHEST)
    turned = x_BTNH.astype(sin.dtype) * cos + swapped.astype(sin.dtype) * sin
    return turned.astype(x_BTNH.dtype)


def _rotate_whole_backward(angles, dy_BTNH):
    """Rotates back; rounds once, while autodiff would round both terms."""
    sin, cos = angles
    return _rotate_whole(dy_BTNH, -sin, cos), None, None


_rotate_whole.defvjp(
    lambda x_BTNH, *angles: (_rotate_whole(x_BTNH, *angles), angles), _rotate_whole_backward
)
