"""int8 weights for decoding, symmetric for each output channel: W is about round(W / s) times s.

s is the largest magnitude of a column over 127. A matmul widens the integers as it reads them, and
scales its result. So the device reads half the bytes of bfloat16.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

LARGEST = 127  # -128 is not used: the range is symmetric


class Rounded(NamedTuple):
    """Integers, and the scale of each output channel."""

    integers: Int8[Array, "I *O"]
    scale: Float[Array, "*O"]


def rounded(kernel: Float[Array, "I *O"]) -> Rounded:
    """The nearest integers, half to even. Columns of zeros have scale 1."""
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    most = jnp.abs(wide).max(0)
    scale = jnp.where(most > 0, most / LARGEST, 1)
    return Rounded(jnp.round(wide / scale).astype(jnp.int8), scale)


class Int8Linear(nnx.Module):
    """A `Linear` (block.py) with rounded weights. It has no gradient and no adapter."""

    def __init__(self, given: Rounded, bias: nnx.Param | None):
        self.kernel, self.kernel_scale = nnx.Param(given.integers), nnx.Param(given.scale)
        self.bias = bias

    def __call__(
        self, x: Float[Array, "B T I"], may_recompute: bool = False
    ) -> Float[Array, "B T ..."]:
        """The product, scaled in float32 or wider."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = self.kernel[...].astype(x.dtype)
        y = jnp.tensordot(x, kernel, axes=1, preferred_element_type=wide) * self.kernel_scale[...]
        return (y if self.bias is None else y + self.bias[...].astype(wide)).astype(x.dtype)


class Int8Rows(nnx.Module):
    """Rows of a head, each with its scale."""

    def __init__(self, rows: Int8[Array, "W D"], scale: Float[Array, " W"]):
        self.rows, self.scale = nnx.Param(rows), nnx.Param(scale)

    @classmethod
    def of(cls, table_VD: Float[Array, "V D"]) -> "Int8Rows":
        """Rounds the rows of a table."""
        given = rounded(table_VD.T)
        return cls(given.integers.T, given.scale)

    def take(self, ids: Any) -> "Int8Rows":
        """Some of the rows."""
        return Int8Rows(self.rows[...][ids], self.scale[...][ids])

    def table(self) -> Float[Array, "W D"]:
        """The rows in the dtype of the scales."""
        return self.rows[...] * self.scale[...][:, None]
