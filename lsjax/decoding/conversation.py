"""A cache that is kept from one text to the next: what both begin with is not read again."""

from collections.abc import Sequence

import numpy as np

from lsjax.decoding.state import DecodeState
from lsjax.model.cache import KVCache


class Conversation:
    """What the last text left in the cache; given to `Engine.stream` for each turn."""

    def __init__(self):
        self.ids: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: KVCache | None = None

    def take(
        self, ids: Sequence[int], capacity: int, num_layers: int
    ) -> tuple[KVCache | None, int]:
        """A cache for so many layers and at least so many slots, and how many of these tokens it
        holds. It is the caller's until `keep`; (None, 0) if there is none."""
        cache, known = self._cache, self.ids
        self._cache, self.ids = None, []
        if cache is None or cache.num_layers != num_layers:
            return None, 0
        return cache.grown(capacity), shared_prefix(known, ids)

    def keep(self, state: DecodeState, count: int | None = None) -> None:
        """Takes the cache of a state with one row; nothing from one that an interrupted program
        has consumed. count: tokens that the cache holds, by default all but the last one, which is
        pending."""
        if state.length_B.is_deleted():
            return
        count = int(state.length_B[0]) - 1 if count is None else count
        # Sliced by the host: the device would compile a program for each length.
        self.ids = np.asarray(state.tokens_BS)[0, :count].tolist()
        self._cache = state.cache


def shared_prefix(known: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens both begin with; at most all of `ids` but the last, which is to be read."""
    limit = min(len(known), len(ids) - 1)
    return next((i for i in range(limit) if known[i] != ids[i]), limit)
