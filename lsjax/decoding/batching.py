"""Continuous batching: requests enter the rows of a batch, and leave them as they end.

requests   0 1 2 3 4 5 ...        a prompt is read in a state of one row, which reuses the prefix
           | | |                  of the previous prompt, and put into the batch (`insert`);
row 0      0 0 0 0 3 3 3 3        rounds run until a row ends; the next request takes the row,
row 1      1 1 2 2 2 2 4 4  -> t  while the others wait for its prompt only

The cache begins with room for the prompts. If a row has no room for another round, cache and
buffers grow to the next capacity. The rows continue with the program for that capacity.

A batch of a long-lived engine reads the prompts of several free rows side by side (`fill`), equal
ones once. Once no request waits, it leaves out its ended rows, half of the rows at a time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from lsjax.config import check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.active_row import ActiveRow
from lsjax.decoding.calls import Calls
from lsjax.decoding.completion import Trace, Update
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.exit_outputs import exit_outputs
from lsjax.decoding.loop_arguments import LoopArguments
from lsjax.decoding.programs import insert, keep_rows
from lsjax.decoding.prompts import TOGETHER, Admitted, side_by_side
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import Runtime, kind_of
from lsjax.decoding.state import LENGTH, RUNNING, STOP, DecodeState
from lsjax.decoding.strategy import Strategy

# Rounds between two reads of the text by the host, if it is streamed or may contain a stop string.
ROUNDS_PER_READ = 4


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
        long_lived: bool = False,
        encode: Callable[..., Request] = lambda request: request,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self._runtime, self._strategy, self._tokenizer = runtime, strategy, tokenizer
        self._stream, self._cancelled, self._encode = stream, cancelled, encode
        self._requests, self._waiting = [*requests], deque(enumerate(requests))
        self._long_lived, self._width = long_lived, runtime.batch_size
        self._conversation = conversation or Conversation()
        self._rows: dict[int, ActiveRow] = {}
        self._worked = 0.0  # seconds, without compiling
        self._compiled_before = runtime.programs.compile_seconds
        self._is_single = runtime.batch_size == 1
        self._fills = long_lived and not self._is_single  # reads prompts side by side
        longest = 1 + max(len(request.prompt) for request in requests)
        total = max(len(request.prompt) + request.max_new_tokens for request in requests)
        self._beside = TOGETHER if self._fills else 1
        held = self._conversation.device_bytes
        runtime.check_memory(longest, total, strategy, held, self._beside)
        # A tokenizer may name end tokens that the model does not have.
        ends = () if ignore_end else tokenizer.eos_ids
        self._ends = [token for token in ends if 0 <= token < runtime.model.vocab_size]
        most = total if long_lived else None
        calls = self._calls = Calls(runtime, strategy, requests, self._ends, most)
        known, capacity = bool(self._conversation.ids), calls.capacity(longest)
        first = calls.first(requests, runtime.batch_size, capacity, self._fills, known)
        runtime.programs.prepare(*first)
        served = self._served(requests)
        self._arguments = LoopArguments(runtime, strategy, requests, served, calls.capacity)
        self._state: DecodeState | None = None
        if not self._is_single:
            self._state = calls.empty_rows(runtime.batch_size, capacity)

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
        total = length + request.max_new_tokens
        runtime.check_memory(1 + length, total, strategy, beside=self._beside)
        self._requests.append(request)
        self._waiting.append((len(self._requests) - 1, request))
        return len(self._requests) - 1

    def _served(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with all ids that end their texts."""
        return [replace(one, stop_ids=(*self._ends, *one.stop_ids)) for one in requests]

    def updates(self) -> Iterator[Update]:
        """Yields updates until all requests have ended."""
        waiting = self._waiting
        try:
            while waiting or self._rows:
                self._admit()
                finish_B = np.array(self._state.finish_B)
                for row in list(self._rows):
                    if (update := self._read(row, finish_B)) is not None:
                        yield update
                finish_B = jax.device_put(finish_B, self._state.finish_B.sharding)
                self._state = replace(self._state, finish_B=finish_B)
                if self._rows and not self._can_admit():
                    self._narrow()
                    self._advance()
        finally:
            self._keep_cache()

    def _keep_cache(self) -> None:
        """Returns the cache of a single row to the conversation."""
        if self._is_single and self._state is not None:
            self._conversation.keep(self._state, *self._kept)
            self._state = None

    @property
    def _kept(self) -> tuple:
        """What a cache in the conversation depends on."""
        return self._calls.depth, self._runtime.model, self._calls.exits

    @property
    def _free(self) -> list[int]:
        """Rows without a request."""
        return [row for row in range(self._width) if row not in self._rows]

    def _can_admit(self) -> bool:
        """Whether requests wait for rows that are free. Those that are read side by side wait for a
        quarter of the rows."""
        enough = max(1, self._width // 4) if self._fills else 1
        return bool(self._waiting) and (len(self._free) >= enough or not self._rows)

    def _admit(self) -> None:
        """Gives free rows to waiting requests."""
        if not self._can_admit():
            return
        taken = {row: self._waiting.popleft() for row in self._free[: len(self._waiting)]}
        if self._fills:
            for some in side_by_side(taken):
                self._read_together(some)
        else:
            for row, given in taken.items():
                self._read_one(row, *given)

    def _read_together(self, taken: Admitted) -> None:
        """Reads prompts side by side, equal ones once."""
        before = self._worked
        self._grow(1 + max(len(request.prompt) for _, request in taken.values()))
        self._state = self._run(*self._calls.filling(taken, self._state))
        for row, (index, request) in taken.items():
            given = index, request, self._tokenizer, before, self._worked
            self._rows[row] = ActiveRow.begin(*given)

    def _read_one(self, row: int, index: int, request: Request) -> None:
        """Reads a prompt and assigns it a row."""
        calls, ids, programs = self._calls, request.prompt, self._runtime.programs
        self._keep_cache()
        if self._is_single:
            capacity = calls.capacity(len(ids) + 1)
        else:
            self._grow(len(ids) + 1)
            capacity = self._state.capacity
        cache, capacity, known = self._conversation.take(ids, capacity, *self._kept)
        cache = calls.new_cache(1, capacity) if cache is None else cache
        before, single = self._worked, calls.rows_of([request], cache, capacity)
        # Compiled before a token is shown.
        loop = calls.loop, self._state or single, np.int32(0), self._arguments.of(capacity)
        programs.get(*loop)
        if calls.pause:
            programs.get(calls.pause, loop[1], np.int32(0))
        single = self._run(calls.reading(len(ids) - known, capacity), single, np.int32(known))
        if self._is_single:
            self._state = single
        else:
            self._state = self._run(partial(insert), self._state, single, np.int32(row))
            self._conversation.keep(single, *self._kept)
        self._rows[row] = ActiveRow.begin(index, request, self._tokenizer, before, self._worked)

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
        seconds = live.seconds(whole, trace, self._worked)
        if reason is None:
            return Update(live.index, text, trace, None)
        del self._rows[row]
        self._runtime.learn(self._strategy, self._state, row)
        finish_B[row] = STOP if finish == RUNNING else finish
        start = len(request.prompt)
        new = range(start, start + len(trace))
        programs = self._runtime.programs
        completion = live.completion(
            trace,
            reason,
            self._tokenizer,
            strategy=self._strategy,
            decode_seconds=seconds,
            compile_seconds=programs.compile_seconds - self._compiled_before,
            exits=exit_outputs(programs, self._state, row, new, request.exits),
        )
        return Update(live.index, text, trace, completion)

    def _advance(self) -> None:
        """Runs rounds until a row ends, a read is due, or the strategy pauses. First grows the
        cache if needed."""
        runtime, calls, before = self._runtime, self._calls, self._worked
        running_B = np.array(self._state.finish_B) == RUNNING
        self._grow(int(np.array(self._state.length_B)[running_B].max()))
        reads = self._stream or any(live.request.stop for live in self._rows.values())
        rounds = np.int32(ROUNDS_PER_READ if reads else np.iinfo(np.int32).max)
        arguments = self._arguments.of(self._state.capacity)
        self._state = self._run(calls.loop, self._state, rounds, arguments)
        if calls.pause:
            self._state = self._run(calls.pause, self._state, rounds)
        runtime.decode_seconds += self._worked - before

    def _grow(self, longest: int) -> None:
        """Gives the rows more slots, if one of `longest` tokens lacks room for another round."""
        if longest + self._strategy.slack > self._state.capacity:
            self._state = self._run(self._calls.growing(longest), self._state)

    def _narrow(self) -> None:
        """Leaves ended rows out of the batch, if half of its rows or fewer still run and no request
        waits."""
        mesh, width = self._runtime.mesh, self._width
        parts = 1 if mesh is None else mesh.shape["data"]
        while width % (2 * parts) == 0 and width // 2 >= len(self._rows):
            width //= 2
        if not self._long_lived or self._waiting or width == self._width:
            return
        running = sorted(self._rows)
        kept_b = np.array([*running, *self._free][:width], np.int32)
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
