"""The key/value cache: one array per layer, updated in place inside the decode loop.

Slot s of a row holds the token at position s. A query at position p looks at the slots 0..p, and
each token writes its own slot before it looks, so stale slots beyond are never seen: dropping
rejected drafts means that the row's next position (DecodeState.length_B) is smaller. No crop, no
copy, and the rows of a batch may differ.

      slots    0   1   2   3   4   5   6   7
      row 0  [ the cat sat on  .   .   .   . ]   the next token has position 4
      row 1  [ a   b   x   y   z   .   .   . ]   x y z were drafted and rejected: the next
                                                 token has position 2 and overwrites x
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from lsjax.config import LlamaConfig

# Above this many rows one scatter instead of a chain of slice updates: as fast, and compiled sooner
# (docs/performance.md). TPUs like slices better.
MAX_UNROLLED_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, K, S, H] so that a head's slots are contiguous.

    keys, values: tuples of arrays, layer l at index l.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]

    @classmethod
    def create(
        cls, config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike, num_layers=None
    ) -> "KVCache":
        """An empty cache for the first `num_layers` layers (all of them by default)."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        layers = range(config.num_layers if num_layers is None else num_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        )


def write_slots(
    cache_BKSH: Float[Array, "B K S H"],
    new_BTKH: Float[Array, "B T K H"],
    start_B: Int[Array, " B"],
) -> Float[Array, "B K S H"]:
    """Puts T new slots at `start_B` of each row; see `write`."""
    return write(cache_BKSH, new_BTKH.swapaxes(1, 2).astype(cache_BKSH.dtype), start_B, axis=2)


def write(
    buffer: Shaped[Array, "B *S"],
    new: Shaped[Array, "B *T"],
    start_B: Int[Array, " B"],
    axis: int = 1,
) -> Shaped[Array, "B *S"]:
    """Puts `new` into `buffer` at `start_B` of each row along `axis`.

    The caller keeps start + T <= S: `dynamic_update_slice` would clamp the start without a word
    and overwrite older slots (DecodeState.create sees to the slack).
    """
    batch = buffer.shape[0]
    if batch > MAX_UNROLLED_ROWS:
        rows = jnp.arange(batch)[:, None]
        slots = start_B[:, None] + jnp.arange(new.shape[axis])
        where = (rows, *[slice(None)] * (axis - 1), slots)
        return buffer.at[where].set(jnp.moveaxis(new, axis, 1), mode="drop")
    for row in range(batch):
        start = [row] + [0] * (buffer.ndim - 1)
        start[axis] = start_B[row]
        buffer = lax.dynamic_update_slice(buffer, new[row : row + 1], start)
    return buffer
