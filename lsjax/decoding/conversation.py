"""The cache of a conversation, which its texts share."""

from collections.abc import Sequence

import jax
import numpy as np

from lsjax.decoding.state import DecodeState
from lsjax.model.protocol import Cache, DecoderModel, grow_cache


class Conversation:
    """A cache that turns of a chat share: pass it to `Engine.watch`. Each reads only new tokens."""

    def __init__(self):
        self.ids: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: Cache | None = None
        self._capacity = self._depth = 0  # of the cache
        self._exits: tuple[int, ...] = ()  # whose draft states it holds
        self._model: DecoderModel | None = None  # the model that computed it

    @property
    def device_bytes(self) -> int:
        """Bytes of the cache on each device."""
        leaves = [leaf for leaf in jax.tree.leaves(self._cache) if not leaf.is_deleted()]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    def take(
        self,
        ids: Sequence[int],
        capacity: int,
        depth: int,
        model: DecoderModel,
        exits: tuple[int, ...] = (),
    ) -> tuple[Cache | None, int, int]:
        """The cache, its slots (at least `capacity`), and how many leading `ids` it holds. The
        program that reads the rest donates it. None without a cache that fits and shares enough.
        exits: whose draft states the cache must hold."""
        cache, shared = self._cache, shared_prefix(self.ids, ids)
        if (
            cache is None
            or jax.tree.leaves(cache)[0].is_deleted()  # by a program that was interrupted
            or self._depth != depth
            or not {*exits} <= {*self._exits}
            or self._model is not model
            or (self._capacity > capacity and shared < capacity // 2)
        ):
            self._cache, self.ids = None, []
            return None, capacity, 0
        if self._capacity < capacity:
            self._cache, self._capacity = grow_cache(model, cache, capacity, depth), capacity
        return self._cache, self._capacity, shared

    def keep(
        self, state: DecodeState, depth: int, model: DecoderModel, exits: tuple[int, ...] = ()
    ) -> None:
        """Keeps the cache of this model's one-row state, unless an interrupted program took it."""
        if not state.length_B.is_deleted():
            # Sliced by the host: the device would compile a program for each length.
            self.ids = np.asarray(state.tokens_BS)[0, : int(state.length_B[0]) - 1].tolist()
            self._cache, self._capacity, self._depth = state.cache, state.capacity, depth
            self._model, self._exits = model, exits


def shared_prefix(known: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the shared prefix; excludes the last token of `ids`, which must be read."""
    limit = min(len(known), len(ids) - 1)
    return next((i for i in range(limit) if known[i] != ids[i]), limit)
