"""A number that tells whether an array still has the bits it had.

Storage has no checksum of its own for the numbers in a checkpoint, so each array is saved with one:

    sum over all elements of mix(bits + c * position)  mod 2^32

`mix` is a bijection on 32 bits (the finaliser of MurmurHash3, Appleby, 2011), so one changed
element always shows, and more of them but for a chance of 2^-32. The terms are whole numbers and
their sum has no order: the fingerprint is the same on any mesh, where each device sums its shard.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

_STEP = 0x9E3779B9  # odd, so that all positions below 2^32 differ


@jax.jit
def fingerprint(x: Array) -> UInt32[Array, ""]:
    """Of the bits of an array of numbers of at most 64 bits each, in row-major order."""
    bits = _words(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + index * jnp.uint32(stride)
    return jnp.sum(_mix(bits + position * jnp.uint32(_STEP)), dtype=jnp.uint32)


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint of each array, as eight hexadecimal digits."""
    numbers = jax.device_get([fingerprint(jnp.asarray(leaf)) for leaf in leaves.values()])
    return {name: f"{int(number):08x}" for name, number in zip(leaves, numbers, strict=True)}


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of each element as one uint32, of 64-bit elements as two."""
    size = x.dtype.itemsize
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if size >= 4:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    def shift_xor(x, bits):
        return x ^ lax.shift_right_logical(x, jnp.uint32(bits))

    x = shift_xor(x, 16) * jnp.uint32(0x85EBCA6B)
    x = shift_xor(x, 13) * jnp.uint32(0xC2B2AE35)
    return shift_xor(x, 16)
