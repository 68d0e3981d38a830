"""What a batch calls: programs (programs.py) with the states and arguments that they take."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lsjax.decoding.programs import decode, fill, grow, insert, pause, prefill
from lsjax.decoding.prompts import Admitted, Prompts, chunk_size, side_by_side
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import Runtime
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.model.parameters import placed
from lsjax.model.protocol import Cache, has_draft_state

FILLER = Request(prompt=(0,), max_new_tokens=0)  # a row that has ended from the start


class Calls:
    """Calls that decode these requests. ends: tokens that end every text. most: as for
    `cache_slots`."""

    def __init__(
        self,
        runtime: Runtime,
        strategy: Strategy,
        requests: Sequence[Request],
        ends: Sequence[int],
        most: int | None,
    ):
        self._runtime, self._strategy = runtime, strategy
        # Sampled texts depend on no text before them: the same seed gives the same text.
        self._greedy = not any(request.sampling.temperature for request in requests)
        # All states fit the same programs.
        options = dict(ends=ends, all_requests=requests, mesh=runtime.mesh)
        self._create = partial(DecodeState.create, **options)
        self.depth = strategy.depth(runtime.model)
        # Exits whose draft states are in the cache.
        self.exits = strategy.exits if has_draft_state(runtime.model) else ()
        self.capacity = partial(runtime.capacity, strategy=strategy, most=most)
        self.loop = partial(decode, strategy=strategy)
        self.pause = partial(pause, strategy=strategy) if strategy.pauses else None

    def rows_of(self, requests: Sequence[Request], cache: Cache, capacity: int) -> DecodeState:
        """Rows of `capacity` slots."""
        lesson = self._runtime.lessons.get(self._strategy) if self._greedy else None
        learned = self._strategy.first_guess(len(requests), lesson)
        return self._create(requests, cache=cache, capacity=capacity, learned=learned)

    def empty_rows(self, rows: int, capacity: int) -> DecodeState:
        """Rows that have ended."""
        return self.rows_of([FILLER] * rows, self.new_cache(rows, capacity), capacity)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache."""
        return self._runtime.new_cache(rows, capacity, self.depth)

    def reading(self, unread: int, capacity: int) -> partial:
        """What reads a prompt with so many unread tokens in a state of one row."""
        return partial(prefill, chunk=chunk_size(unread, capacity), **self._layers)

    def filling(self, taken: Admitted, state: DecodeState, cache: Callable | None = None) -> tuple:
        """The call that reads these requests' prompts, side by side and equal ones once. cache:
        makes an empty one."""
        requests = {row: request for row, (_, request) in taken.items()}
        rows, mesh = len(state.finish_B), self._runtime.mesh
        multiple = 1 if mesh is None else mesh.shape["data"]
        prompts = Prompts.of(requests, rows, state.capacity, multiple)
        empty = (cache or self.new_cache)(*prompts.tokens_US.shape)
        new = self.rows_of([requests.get(row, FILLER) for row in range(rows)], None, state.capacity)
        function = partial(fill, chunk=prompts.chunk, **self._layers)
        return function, state, new, placed(prompts, mesh)._replace(cache=empty)

    def growing(self, longest: int) -> partial:
        """What gives the rows slots for `longest` tokens."""
        return partial(grow, capacity=self.capacity(longest), depth=self.depth)

    def first(
        self, requests: Sequence[Request], rows: int, capacity: int, fills: bool, known: bool
    ) -> list[tuple]:
        """The first calls for these requests, with shapes in place of a cache. capacity: of a
        batch's rows. fills: prompts are read side by side. known: the first prompt's beginning is
        in a cache."""
        prompt = requests[0].prompt
        if rows == 1:
            capacity = self.capacity(len(prompt) + 1)
        shapes = partial(self._runtime.cache_shapes, depth=self.depth)
        single = self.rows_of(requests[:1], None, capacity).with_cache(shapes(1, capacity))
        state = single
        if rows > 1:
            state = self.rows_of([FILLER] * rows, None, capacity)
            state = state.with_cache(shapes(rows, capacity))
        arguments = self._runtime.plain_arguments(self._strategy)
        calls = [(self.loop, state, np.int32(0), arguments)]
        if self.pause:
            calls.append((self.pause, state, np.int32(0)))
        if fills:
            begin = {row: (row, request) for row, request in enumerate(requests[:rows])}
            return [*calls, self.filling(next(side_by_side(begin)), state, shapes)]
        if rows > 1:
            calls.append((partial(insert), state, single, np.int32(0)))
        if not known:
            calls.append((self.reading(len(prompt), capacity), single, np.int32(0)))
        return calls

    @property
    def _layers(self) -> dict:
        """What prompts run through."""
        return dict(depth=self.depth, exits=self.exits)
