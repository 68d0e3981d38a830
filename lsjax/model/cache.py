"""Key/value cache: one array per layer, updated in place inside the decode loop.

Slot s of a row holds the token at position s. A query at position p reads the slots 0..p. Each
token writes its own slot first, so stale slots are never read. Rejected drafts only lower the
row's next position (DecodeState.length_B). That needs no crop and no copy, and rows may differ.

      slots    0   1   2   3   4   5   6   7
      row 0  [ the cat sat on  .   .   .   . ]   the next token has position 4
      row 1  [ a   b   x   y   z   .   .   . ]   x y z were drafted and rejected: the next
                                                 token has position 2 and overwrites x
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lsjax.config import LlamaConfig
from lsjax.model.parameters import sharding_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, K, S, H] so that a head's slots are contiguous."""

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        num_layers: int | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache for the first `num_layers` layers (by default all), sharded on a mesh."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        layers = range(config.num_layers if num_layers is None else num_layers)
        place = sharding_of("keys.0", shape, mesh)
        keys, values = ([jnp.zeros(shape, dtype, device=place) for _ in layers] for _ in range(2))
        return cls(tuple(keys), tuple(values))

    @property
    def capacity(self) -> int:
        """S: slots of a row."""
        return self.keys[0].shape[2]

    @property
    def num_layers(self) -> int:
        """Number of layers in the cache."""
        return len(self.keys)

    def grown(self, capacity: int) -> "KVCache":
        """The cache with empty slots appended up to `capacity`; unchanged if it has as many."""
        more = capacity - self.capacity
        if more <= 0:
            return self
        padding = [(0, 0), (0, 0), (0, more), (0, 0)]
        return jax.tree.map(lambda leaf: jnp.pad(leaf, padding), self)
