"""Continuous batching: requests enter the rows of a batch, and leave them as they end.

requests   0 1 2 3 4 5 ...        a prompt is read in a state of one row, which reuses the prefix
           | | |                  of the previous prompt, and put into the batch (`insert`);
row 0      0 0 0 0 3 3 3 3        rounds run until a row ends; the next request takes the row,
row 1      1 1 2 2 2 2 4 4  -> t  while the others wait for its prompt only

The cache begins with room for the prompts. If a row has no room for another round, cache and
buffers grow to the next capacity. The rows continue with the program for that capacity. Once no
request waits, a batch can leave out its ended rows (`narrows`), half of the rows at a time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from lsjax.config import check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.completion import Completion, RowText, Trace, Update
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.exit_outputs import exit_outputs
from lsjax.decoding.loop_arguments import LoopArguments
from lsjax.decoding.programs import chunk_size, decode, grow, insert, keep_rows, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import Runtime, kind_of
from lsjax.decoding.state import EOS, LENGTH, RUNNING, STOP, DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.model.protocol import Cache, has_draft_state

# Rounds between two reads of the text by the host, if it is streamed or may contain a stop string.
ROUNDS_PER_READ = 4
FILLER = Request(prompt=(0,), max_new_tokens=0)  # a row that has ended from the start


@dataclass
class ActiveRow:
    """A request in a row of the batch."""

    index: int
    request: Request
    text: RowText
    prefill_seconds: float
    began: float  # computing seconds of the batch at the row's first token
    last_read: tuple[float, int]  # when last read: computing seconds, rounds of the row


class ContinuousBatch:
    """Decodes requests, whose prompts are token ids, with one strategy.

    stream: read the texts every few rounds. encode: makes a request of what `add` is given. Other
    arguments: as for `Engine` and `Engine.watch`.
    """

    def __init__(
        self,
        runtime: Runtime,
        strategy: Strategy,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        ignore_end: bool = False,
        stream: bool = False,
        narrows: bool = False,
        encode: Callable[..., Request] = lambda request: request,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self._runtime, self._strategy, self._tokenizer = runtime, strategy, tokenizer
        self._stream, self._cancelled, self._encode = stream, cancelled, encode
        self._requests, self._waiting = [*requests], deque(enumerate(requests))
        self._narrows, self._width = narrows, runtime.batch_size
        self._depth = strategy.depth(runtime.model)
        self._loop, self._pause = partial(decode, strategy=strategy), runtime.pause_of(strategy)
        self._conversation = conversation or Conversation()
        self._rows: dict[int, ActiveRow] = {}
        self._worked = 0.0  # seconds, without compiling
        self._compiled_before = runtime.programs.compile_seconds
        self._is_single = runtime.batch_size == 1
        longest = 1 + max(len(request.prompt) for request in requests)
        total = max(len(request.prompt) + request.max_new_tokens for request in requests)
        runtime.check_memory(longest, total, strategy, held=self._conversation.device_bytes)
        # A tokenizer may name end tokens that the model does not have.
        ends = () if ignore_end else tokenizer.eos_ids
        ends = [token for token in ends if 0 <= token < runtime.model.vocab_size]
        # All states fit the same programs.
        options = dict(ends=ends, all_requests=requests, mesh=runtime.mesh)
        self._create = partial(DecodeState.create, **options)
        self._state: DecodeState | None = None
        self._prepare(runtime.capacity(longest, strategy))
        self._ends = ends
        self._arguments = LoopArguments(runtime, strategy, requests, self._served(requests))
        if not self._is_single:
            rows, capacity = runtime.batch_size, runtime.capacity(longest, strategy)
            self._state = self._rows_of([FILLER] * rows, self._new_cache(rows, capacity), capacity)

    def add(self, *given: Any, **options: Any) -> int:
        """Adds a request while others run, and returns its index in the updates. An engine's batch
        takes a prompt and the fields of `Request`.

        Raises ConfigError as `Engine.generate` does, and if no running program decodes the request.
        """
        request = self._encode(*given, **options)
        runtime, strategy = self._runtime, self._strategy
        new, known = self._served([request]), self._served(self._requests)
        check(
            kind_of([*known, *new]) == kind_of(known),
            "a request that is added must have options that others of the batch have: sampling, "
            "filters, penalties, log_probs and the number of stop ids",
        )
        check(bool(self._waiting or self._rows), "all texts of the batch have ended: make another")
        length = len(request.prompt)
        runtime.check_memory(1 + length, length + request.max_new_tokens, strategy)
        self._requests.append(request)
        self._waiting.append((len(self._requests) - 1, request))
        return len(self._requests) - 1

    def _served(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with all ids that end their texts."""
        return [replace(one, stop_ids=(*self._ends, *one.stop_ids)) for one in requests]

    def _rows_of(self, requests: Sequence[Request], cache: Cache, capacity: int) -> DecodeState:
        learned = self._strategy.first_guess(len(requests))
        return self._create(requests, cache=cache, capacity=capacity, learned=learned)

    def _prepare(self, capacity: int) -> None:
        """Compiles the programs of the first text side by side. capacity: slots of a batch's
        rows."""
        runtime, strategy, first = self._runtime, self._strategy, self._requests[0]
        rows = 1 if self._is_single else runtime.batch_size
        if self._is_single:
            capacity = runtime.capacity(len(first.prompt) + 1, strategy)
        shapes = partial(runtime.cache_shapes, capacity=capacity, depth=self._depth)
        single = self._rows_of([first], None, capacity).with_cache(shapes(1))
        state = single
        if not self._is_single:
            state = self._rows_of([FILLER] * rows, None, capacity).with_cache(shapes(rows))
        calls = [(self._loop, state, np.int32(0), runtime.plain_arguments(strategy))]
        calls += [(self._pause, state)] if self._pause else []
        calls += [] if self._is_single else [(partial(insert), state, single, np.int32(0))]
        if not self._conversation.ids:  # otherwise a part of the prompt is known
            calls.append((self._reader(len(first.prompt), capacity), single, np.int32(0)))
        runtime.programs.prepare(*calls)

    def _reader(self, unread: int, capacity: int) -> partial:
        """The function that reads a prompt with so many unread tokens."""
        chunk = chunk_size(unread, capacity)
        return partial(prefill, chunk=chunk, depth=self._depth, exits=self._exits)

    @property
    def _exits(self) -> tuple[int, ...]:
        """Exits whose draft states are in the cache."""
        return self._strategy.exits if has_draft_state(self._runtime.model) else ()

    def _new_cache(self, rows: int, capacity: int) -> Cache:
        return self._runtime.new_cache(rows, capacity, self._depth)

    def updates(self) -> Iterator[Update]:
        """Yields updates until all requests have ended."""
        waiting = self._waiting
        try:
            while waiting or self._rows:
                for row in range(self._width):
                    if waiting and row not in self._rows:
                        self._admit(row, *waiting.popleft())
                finish_B = np.array(self._state.finish_B)
                for row in list(self._rows):
                    if (update := self._read(row, finish_B)) is not None:
                        yield update
                finish_B = jax.device_put(finish_B, self._state.finish_B.sharding)
                self._state = replace(self._state, finish_B=finish_B)
                if self._rows and (not waiting or len(self._rows) == self._width):
                    self._narrow()
                    self._advance()
        finally:
            self._keep_cache()

    def _keep_cache(self) -> None:
        """Returns the cache of a single row to the conversation."""
        if self._is_single and self._state is not None:
            self._conversation.keep(self._state, self._depth, self._runtime.model, self._exits)
            self._state = None

    def _admit(self, row: int, index: int, request: Request) -> None:
        """Reads a prompt and assigns it a row."""
        runtime, ids, depth = self._runtime, request.prompt, self._depth
        self._keep_cache()
        if self._is_single:
            capacity = runtime.capacity(len(ids) + 1, self._strategy)
        else:
            self._grow(len(ids) + 1)
            capacity = self._state.capacity
        taken = self._conversation.take(ids, capacity, depth, runtime.model, self._exits)
        cache, capacity, known = taken
        cache = self._new_cache(1, capacity) if cache is None else cache
        before, single = self._worked, self._rows_of([request], cache, capacity)
        # Compiled before a token is shown.
        loop = self._loop, self._state or single, np.int32(0), self._arguments.of(capacity)
        runtime.programs.get(*loop)
        if self._pause:
            runtime.programs.get(self._pause, loop[1])
        single = self._run(self._reader(len(ids) - known, capacity), single, np.int32(known))
        if self._is_single:
            self._state = single
        else:
            self._state = self._run(partial(insert), self._state, single, np.int32(row))
            self._conversation.keep(single, depth, runtime.model, self._exits)
        text, now = RowText(self._tokenizer, ids, request.stop), self._worked
        self._rows[row] = ActiveRow(index, request, text, now - before, now, (now, 0))

    def _read(self, row: int, finish_B: np.ndarray) -> Update | None:
        """Reads a row's new tokens, if it has ended or its text is needed. Marks its end."""
        live, finish, cancelled = self._rows[row], int(finish_B[row]), self._cancelled()
        request = live.request
        if finish == RUNNING and not (self._stream or request.stop or cancelled):
            return None
        whole = Trace.of(self._state, row, len(request.prompt))
        text, trace, reason = live.text.read(whole, finish)
        if reason is None and cancelled:
            rest, trace, _ = live.text.read(trace, LENGTH)
            text, reason = text + rest, "interrupt"
        (last_read, before), live.last_read = live.last_read, (self._worked, whole.rounds)
        if reason is None:
            return Update(live.index, text, trace, None)
        del self._rows[row]
        finish_B[row] = STOP if finish == RUNNING else finish
        # Rounds after a stop string do not count. The host sees the string only when it reads next.
        share = (trace.rounds - before) / max(1, whole.rounds - before)
        is_stop = finish == EOS and trace.tokens_n[-1] in request.stop_ids
        start = len(request.prompt)
        new = range(start, start + len(trace))
        read = exit_outputs(self._runtime.programs, self._state, row, new, request.exits)
        completion = Completion.of(
            trace if request.log_probs else replace(trace, log_probs_n=None),
            strategy=self._strategy,
            seed=request.sampling.seed if request.sampling.temperature else None,
            prompt=self._tokenizer.decode(request.prompt),
            text=live.text.text,
            num_prompt_tokens=len(request.prompt),
            prefill_seconds=live.prefill_seconds,
            decode_seconds=last_read + share * (self._worked - last_read) - live.began,
            compile_seconds=self._runtime.programs.compile_seconds - self._compiled_before,
            finish_reason="stop" if is_stop else reason,
            exits=read,
        )
        return Update(live.index, text, trace, completion)

    def _advance(self) -> None:
        """Runs rounds until a row ends, a read is due, or the strategy pauses. First grows the
        cache if needed."""
        runtime, before = self._runtime, self._worked
        running_B = np.array(self._state.finish_B) == RUNNING
        self._grow(int(np.array(self._state.length_B)[running_B].max()))
        reads = self._stream or any(live.request.stop for live in self._rows.values())
        rounds = np.int32(ROUNDS_PER_READ if reads else np.iinfo(np.int32).max)
        arguments = self._arguments.of(self._state.capacity)
        self._state = self._run(self._loop, self._state, rounds, arguments)
        if self._pause:
            self._state = self._run(self._pause, self._state)
        runtime.decode_seconds += self._worked - before

    def _grow(self, longest: int) -> None:
        """Gives the rows more slots, if one of `longest` tokens lacks room for another round."""
        if longest + self._strategy.slack > self._state.capacity:
            slots = self._runtime.capacity(longest, self._strategy)
            larger = partial(grow, capacity=slots, depth=self._depth)
            self._state = self._run(larger, self._state)

    def _narrow(self) -> None:
        """Leaves ended rows out of the batch, if half of its rows or fewer still run and no request
        waits."""
        mesh, width = self._runtime.mesh, self._width
        parts = 1 if mesh is None else mesh.shape["data"]
        while width % (2 * parts) == 0 and width // 2 >= len(self._rows):
            width //= 2
        if not self._narrows or self._waiting or width == self._width:
            return
        running = sorted(self._rows)
        ended = [row for row in range(self._width) if row not in self._rows]
        kept_b = np.array([*running, *ended][:width], np.int32)
        self._state = self._run(partial(keep_rows), self._state, kept_b)
        self._rows, self._width = {new: self._rows[old] for new, old in enumerate(running)}, width
        self._arguments.narrow(width, self._state.capacity)

    def _run(self, function: partial, *arguments) -> DecodeState:
        """Runs a function's program. Compiling it first does not count as work."""
        program = self._runtime.programs.get(function, *arguments)
        begin = time.perf_counter()
        state = jax.block_until_ready(program(*arguments))
        self._worked += time.perf_counter() - begin
        return state
