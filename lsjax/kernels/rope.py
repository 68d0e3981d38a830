"""Rotary embeddings by a matmul.

Swapping the halves of a head by slices makes arrays of h = H / 2 channels. With `rotates_by_matmul`
a permutation matrix swaps them instead.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsjax.platforms import tuning

# Sine and cosine, each [B, T, 1, h or H]; None for a layer without rope.
Rope = tuple[Array, Array] | None


def for_training(ropes: Mapping[str, Rope]) -> Mapping[str, Rope]:
    """Angles as `rotate` takes them in training: of h channels, or of all H channels with the first
    h sines negated."""
    if not tuning().rotates_by_matmul:
        return ropes
    return {kind: rope and _all_channels(*rope) for kind, rope in ropes.items()}


def _all_channels(sin, cos):
    return jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    rope: Rope,
    reference: Callable[[Float[Array, "B T N H"], Rope], Float[Array, "B T N H"]],
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) by their angle."""
    if rope is None or rope[0].shape[-1] != x_BTNH.shape[-1]:
        return reference(x_BTNH, rope)
    return _rotate_whole(x_BTNH, *rope)


@jax.custom_vjp
def _rotate_whole(x_BTNH, sin, cos):
    """x cos + (x with its halves swapped) sin; exact, as each sum of the matmul has one term. The
    permutation has a batch axis, so that remat policies do not keep the matmul."""
    batch, _, _, size = x_BTNH.shape
    swap_HH = jnp.roll(jnp.eye(size, dtype=x_BTNH.dtype), size // 2, axis=0)
    swap_BHH = jnp.broadcast_to(swap_HH, (batch, size, size))
    swapped = jnp.einsum("BTNH,BHn->BTNn", x_BTNH, swap_BHH, precision=lax.Precision.HIGHEST)
    turned = x_BTNH.astype(sin.dtype) * cos + swapped.astype(sin.dtype) * sin
    return turned.astype(x_BTNH.dtype)


def _rotate_whole_backward(angles, dy_BTNH):
    """Rotates back; rounds once, while autodiff would round both terms."""
    sin, cos = angles
    return _rotate_whole(dy_BTNH, -sin, cos), None, None


_rotate_whole.defvjp(
    lambda x_BTNH, *angles: (_rotate_whole(x_BTNH, *angles), angles), _rotate_whole_backward
)
