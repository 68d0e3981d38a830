"""Continuous batching: requests enter the rows of a batch, and leave them as they end.

requests   0 1 2 3 4 5 ...        a prompt is read in a state of one row, which reuses the prefix
           | | |                  of the previous prompt, and put into the batch (`insert`);
row 0      0 0 0 0 3 3 3 3        rounds run until a row ends; the next request takes the row,
row 1      1 1 2 2 2 2 4 4  -> t  while the others wait for its prompt only

The cache begins with room for the prompts. If a row has no room for another round, cache and
buffers grow to the next capacity. The rows continue with the program for that capacity.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lsjax.decoding.completion import Completion, RowText, Trace, Update
from lsjax.decoding.programs import chunk_size, decode, grow, insert, pause, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.state import EOS, LENGTH, RUNNING, STOP, DecodeState
from lsjax.decoding.stopwatch import MEASURING
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

if TYPE_CHECKING:
    from lsjax.decoding.engine import Engine

# Rounds between two reads of the text by the host, if it is streamed or may contain a stop string.
ROUNDS_PER_LOOK = 4
FILLER = Request(prompt=(0,), max_new_tokens=0)  # a row that has ended from the start


class Conversation:
    """A cache that turns of a chat share: pass it to `Engine.watch`. Each reads only new tokens."""

    def __init__(self):
        self.ids: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: KVCache | None = None
        self._model: Llama | None = None  # the model that computed them

    @property
    def device_bytes(self) -> int:
        """Bytes of the cache on each device."""
        leaves = [leaf for leaf in jax.tree.leaves(self._cache) if not leaf.is_deleted()]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    def take(
        self, ids: Sequence[int], capacity: int, num_layers: int, model: Llama
    ) -> tuple[KVCache | None, int]:
        """The cache, grown to `capacity` slots, and how many leading `ids` it holds. The program
        that reads the rest donates it. (None, 0) without a cache that fits and shares enough."""
        cache, shared = self._cache, shared_prefix(self.ids, ids)
        if (
            cache is None
            or cache.keys[0].is_deleted()  # by a program that was interrupted
            or cache.num_layers != num_layers
            or self._model is not model
            or (cache.capacity > capacity and shared < capacity // 2)
        ):
            self._cache, self.ids = None, []
            return None, 0
        self._cache = cache.grown(capacity)
        return self._cache, shared

    def keep(self, state: DecodeState, model: Llama) -> None:
        """Keeps the cache of this model's one-row state, unless an interrupted program took it."""
        if not state.length_B.is_deleted():
            # Sliced by the host: the device would compile a program for each length.
            self.ids = np.asarray(state.tokens_BS)[0, : int(state.length_B[0]) - 1].tolist()
            self._cache, self._model = state.cache, model


@dataclass
class ActiveRow:
    """A request in a row of the batch."""

    index: int
    request: Request
    text: RowText
    prefill_seconds: float
    began: float  # computing seconds of the batch at the row's first token
    looked: tuple[float, int]  # when last read: computing seconds, rounds of the row


class ContinuousBatch:
    """Decodes requests, whose prompts are token ids, with the engine's current strategy.

    stream: look at the texts every few rounds. Other arguments: as for `Engine.watch`.
    """

    def __init__(
        self,
        engine: "Engine",
        requests: Sequence[Request],
        *,
        stream: bool = False,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self._engine, self._requests, self._stream = engine, requests, stream
        self._strategy = engine.strategy
        self._depth = self._strategy.depth(engine.model.config)
        self._loop = partial(decode, strategy=self._strategy)
        self._pause = None
        if self._strategy.pauses(engine.programs.tuning):
            self._pause = partial(pause, strategy=self._strategy)
        self._conversation = conversation or Conversation()
        self._cancelled = cancelled
        self._rows: dict[int, ActiveRow] = {}
        self._worked = 0.0  # seconds, without compiling
        self._compiled_before = engine.programs.compile_seconds
        self._is_single = engine.batch_size == 1
        longest = 1 + max(len(request.prompt) for request in requests)
        total = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine.check_memory(longest, total, held=self._conversation.device_bytes)
        # By slots. Known before the first text: none waits for timings, and the engine may change
        # its strategy. One larger size is timed: each further one would compile another program.
        first = engine.capacity(longest)
        sizes = {first, min(engine.capacity(first + 1), engine.capacity(total))}
        if self._is_single:
            sizes |= {engine.capacity(1 + len(request.prompt)) for request in requests}
        budget = MEASURING / len(sizes)
        self._arguments = {size: engine.arguments_for(size, budget) for size in sorted(sizes)}
        self._state: DecodeState | None = None
        config, ends = engine.model.config, () if engine.ignore_end else engine.tokenizer.eos_ids
        # All states fit the same programs.
        self._create = partial(
            DecodeState.create,
            config,
            num_layers=self._depth,
            dtype=engine.model.dtype,
            # A tokenizer may name end tokens that the model does not have.
            ends=[token for token in ends if 0 <= token < config.vocab_size],
            among=requests,
            mesh=engine.mesh,
        )
        if not self._is_single:
            rows, learned = engine.batch_size, self._strategy.first_guess(engine.batch_size)
            capacity = engine.capacity(longest)
            self._state = self._create([FILLER] * rows, capacity=capacity, learned=learned)

    def updates(self) -> Iterator[Update]:
        """Yields updates until all requests have ended."""
        waiting, rows = deque(enumerate(self._requests)), self._engine.batch_size
        try:
            while waiting or self._rows:
                for row in range(rows):
                    if waiting and row not in self._rows:
                        self._admit(row, *waiting.popleft())
                finish_B = np.array(self._state.finish_B)
                for row in list(self._rows):
                    if (update := self._look(row, finish_B)) is not None:
                        yield update
                finish_B = jax.device_put(finish_B, self._state.finish_B.sharding)
                self._state = replace(self._state, finish_B=finish_B)
                if self._rows and (not waiting or len(self._rows) == rows):
                    self._advance()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._is_single and self._state is not None:
            self._conversation.keep(self._state, self._engine.model)
            self._state = None

    def _admit(self, row: int, index: int, request: Request) -> None:
        """Reads a prompt and assigns it a row."""
        engine, ids = self._engine, request.prompt
        self._leave()
        if self._is_single:
            capacity = engine.capacity(len(ids) + 1, self._strategy)
        else:
            capacity = self._state.capacity
        cache, known = self._conversation.take(ids, capacity, self._depth, engine.model)
        capacity = capacity if cache is None else cache.capacity
        learned, before = self._strategy.first_guess(1), self._worked
        single = self._create([request], capacity=capacity, cache=cache, learned=learned)
        # Compiled before a token is shown.
        loop = self._loop, self._state or single, np.int32(0), self._arguments_for(capacity)
        engine.programs.get(*loop)
        if self._pause:
            engine.programs.get(self._pause, loop[1])
        chunk = chunk_size(len(ids) - known, single.capacity)
        read = partial(prefill, chunk=chunk, depth=self._depth)
        single = self._run(read, single, np.int32(known))
        if self._is_single:
            self._state = single
        else:
            self._state = self._run(partial(insert), self._state, single, np.int32(row))
            self._conversation.keep(single, engine.model)
        text, now = RowText(engine.tokenizer, ids, request.stop), self._worked
        self._rows[row] = ActiveRow(index, request, text, now - before, now, (now, 0))

    def _look(self, row: int, finish_B: np.ndarray) -> Update | None:
        """Reads a row's new tokens, if it has ended or its text is needed. Marks its end."""
        live, finish, cancelled = self._rows[row], int(finish_B[row]), self._cancelled()
        request, engine = live.request, self._engine
        if finish == RUNNING and not (self._stream or request.stop or cancelled):
            return None
        whole = Trace.of(self._state, row, len(request.prompt))
        text, trace, reason = live.text.look(whole, finish)
        if reason is None and cancelled:
            rest, trace, _ = live.text.look(trace, LENGTH)
            text, reason = text + rest, "interrupt"
        (looked, before), live.looked = live.looked, (self._worked, whole.rounds)
        if reason is None:
            return Update(live.index, text, trace, None)
        del self._rows[row]
        finish_B[row] = finish or STOP
        # Rounds after a stop string do not count. The host sees the string only at the next look.
        share = (trace.rounds - before) / max(1, whole.rounds - before)
        is_stop = finish == EOS and trace.tokens_n[-1] in request.stop_ids
        completion = Completion.of(
            trace if request.log_probs else replace(trace, log_probs_n=None),
            strategy=self._strategy,
            seed=request.sampling.seed if request.sampling.temperature else None,
            prompt=engine.tokenizer.decode(request.prompt),
            text=live.text.text,
            num_prompt_tokens=len(request.prompt),
            prefill_seconds=live.prefill_seconds,
            decode_seconds=looked + share * (self._worked - looked) - live.began,
            compile_seconds=engine.programs.compile_seconds - self._compiled_before,
            finish_reason="stop" if is_stop else reason,
        )
        return Update(live.index, text, trace, completion)

    def _advance(self) -> None:
        """Runs rounds until a row ends, a look is due, or the strategy pauses. First grows the
        cache if needed."""
        state, engine, before = self._state, self._engine, self._worked
        longest = int(np.array(state.length_B)[np.array(state.finish_B) == RUNNING].max())
        if longest + self._strategy.slack > state.capacity:
            larger = partial(grow, capacity=engine.capacity(longest, self._strategy))
            self._state = self._run(larger, state)
        del state  # the smaller cache, before anything is compiled
        looks = self._stream or any(live.request.stop for live in self._rows.values())
        rounds = np.int32(ROUNDS_PER_LOOK if looks else np.iinfo(np.int32).max)
        arguments = self._arguments_for(self._state.capacity)
        self._state = self._run(self._loop, self._state, rounds, arguments)
        if self._pause:
            self._state = self._run(self._pause, self._state)
        engine.decode_seconds += self._worked - before

    def _arguments_for(self, capacity: int) -> Any:
        """The loop's arguments: those of the largest size up to `capacity`."""
        return self._arguments[max(size for size in self._arguments if size <= capacity)]

    def _run(self, function: partial, *arguments) -> DecodeState:
        """Runs a function's program. Compiling it first does not count as work."""
        program = self._engine.programs.get(function, *arguments)
        begin = time.perf_counter()
        state = jax.block_until_ready(program(*arguments))
        self._worked += time.perf_counter() - begin
        return state


def shared_prefix(known: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the shared prefix; excludes the last token of `ids`, which must be read."""
    limit = min(len(known), len(ids) - 1)
    return next((i for i in range(limit) if known[i] != ids[i]), limit)
