"""A cache that is kept from one text to the next: what both begin with is not read again."""

from collections.abc import Sequence

import jax
import numpy as np

from lsjax.decoding.state import DecodeState
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama


class Conversation:
    """What the last text left in the cache; given to `Engine.stream` for each turn."""

    def __init__(self):
        self.ids: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: KVCache | None = None
        self._model: Llama | None = None  # whose they are

    def take(
        self, ids: Sequence[int], capacity: int, num_layers: int, model: Llama
    ) -> tuple[KVCache | None, int]:
        """A cache of this model for so many layers and at least so many slots, and how many of
        these tokens it holds. It is the caller's until `keep`. Gives (None, 0) without a cache, and
        for a larger one that shares little."""
        cache, known, whose = self._cache, self.ids, self._model
        self._cache, self.ids, self._model = None, [], None
        if cache is None or cache.num_layers != num_layers or whose is not model:
            return None, 0
        shared = shared_prefix(known, ids)
        if cache.capacity > capacity and shared < capacity // 2:
            return None, 0
        return cache.grown(capacity), shared

    @property
    def device_bytes(self) -> int:
        """Bytes of the cache on each device."""
        leaves = jax.tree.leaves(self._cache)
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    def keep(self, state: DecodeState, model: Llama, count: int | None = None) -> None:
        """Takes the cache of a state with one row, which this model filled; nothing from one that
        an interrupted program has consumed. count: tokens that the cache holds, by default all but
        the last one, which is pending."""
        if state.length_B.is_deleted():
            return
        count = int(state.length_B[0]) - 1 if count is None else count
        # Sliced by the host: the device would compile a program for each length.
        self.ids = np.asarray(state.tokens_BS)[0, :count].tolist()
        self._cache, self._model = state.cache, model


def shared_prefix(known: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens both begin with; at most all of `ids` but the last, which is to be read."""
    limit = min(len(known), len(ids) - 1)
    return next((i for i in range(limit) if known[i] != ids[i]), limit)
