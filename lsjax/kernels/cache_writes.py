"""Writing to buffers whose rows go on at their own positions."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from lsjax.platforms import tuning


def write(
    buffer: Shaped[Array, "..."],
    new: Shaped[Array, "B *T"],
    start_B: Int[Array, " B"],
    axis: int = 1,
) -> Shaped[Array, "..."]:
    """Writes `new` into the buffer at `start_B` of each row along `axis`. The caller ensures
    start + T <= S: `dynamic_update_slice` would clamp the start and overwrite older slots."""
    batch = new.shape[0]
    if batch > tuning().unrolled_writes:
        # One index for each axis up to the slots: without those of the heads, XLA:TPU would choose
        # another layout for the whole cache.
        where = list(jnp.indices(new.shape[: axis + 1], sparse=True))
        where[axis] += start_B.reshape(batch, *[1] * axis)
        return buffer.at[tuple(where)].set(new, mode="drop")
    for row in range(batch):
        start = [row] + [0] * (new.ndim - 1)
        start[axis] = start_B[row]
        buffer = lax.dynamic_update_slice(buffer, new[row : row + 1], start)
    return buffer
