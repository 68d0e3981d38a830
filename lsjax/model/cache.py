"""Key/value cache: one array per layer, updated in place inside the decode loop.

Slot s of a row holds the token at position s. A query at position p reads the slots 0..p. Each
token writes its own slot first, so stale slots are never read. Rejected drafts only lower the
row's next position (DecodeState.length_B). That needs no crop and no copy, and rows may differ.

      slots    0   1   2   3   4   5   6   7
      row 0  [ the cat sat on  .   .   .   . ]   the next token has position 4
      row 1  [ a   b   x   y   z   .   .   . ]   x y z were drafted and rejected: the next
                                                 token has position 2 and overwrites x
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lsjax.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, K, S, H] so that a head's slots are contiguous.

    block_keys, block_values: those of exit blocks (exit_blocks.py), by their exits.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    block_keys: dict[str, Float[Array, "B K S H"]] = field(default_factory=dict)
    block_values: dict[str, Float[Array, "B K S H"]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        depth: int | None = None,
        block_exits: Iterable[str] = (),
    ) -> "KVCache":
        """An empty cache for the first `depth` layers, by default all, and for the exit blocks
        among them."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        depth = config.num_layers if depth is None else depth
        blocks = [exit_layer for exit_layer in block_exits if int(exit_layer) <= depth]
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(depth)) for _ in range(2))
        of_blocks = ({name: jnp.zeros(shape, dtype) for name in blocks} for _ in range(2))
        return cls(keys, values, *of_blocks)
