"""One run of an engine: requests enter the rows of a batch, and leave them as they end.

requests   0 1 2 3 4 5 ...        a prompt is read in a state of one row ("single"), with what
           | | |                  it shares with the prompt before, and put into the batch
row 0      0 0 0 0 3 3 3 3        (`insert`); rounds go on until a row ends; the row is given
row 1      1 1 2 2 2 2 4 4  -> t  to the next request while the others wait for its prompt only

The cache begins with room for the prompts. Where a row has no room for another round, cache and
buffers grow to the next capacity, and the rows go on with the program for that one.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from lsjax.decoding.completion import Completion, RowText, Trace
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.loops import decode, grow, insert, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.state import EOS, RUNNING, STOP, DecodeState

if TYPE_CHECKING:
    from lsjax.decoding.engine import Engine

# A prompt is read in chunks of the smallest of these that holds it, a longer one in several of
# the largest: as many programs as there are sizes, whatever the prompts.
CHUNKS = (32, 64, 128, 256, 512)
STOP_IDS = 4  # room for stop ids in a row: a multiple of this
# Rounds between two looks at the text, where somebody waits for it or a stop string may be in it.
ROUNDS_PER_LOOK = 4
ALL_ROUNDS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Update:
    """What one look at a row found: text that nobody has seen yet (text that may be the beginning
    of a stop string waits), the trace so far, and at the end the completion."""

    index: int  # of the request
    text: str
    trace: Trace
    completion: Completion | None


@dataclass
class Row:
    """A request in a row of the batch."""

    index: int
    request: Request
    ids: list[int]
    text: RowText
    prefill_seconds: float
    began: float  # seconds of work of the run when the first token was there
    looked: tuple[float, int]  # at the last look: seconds of work of the run, rounds of the row


class Run:
    """Decodes requests with the engine's strategy of this moment.

    asked: requests and the ids of their prompts. stream: look at the texts every few rounds.
    conversation: where the cache comes from and is left, for an engine with one row. cancelled:
    asked at each look; what runs then ends.
    """

    def __init__(
        self,
        engine: "Engine",
        asked: Sequence[tuple[Request, list[int]]],
        *,
        stream: bool = False,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self._engine, self._asked, self._stream = engine, asked, stream
        self._strategy, self._arguments = engine.strategy, engine.arguments
        self._depth = self._strategy.depth(engine.model.config)
        self._conversation = conversation or Conversation()
        self._cancelled = cancelled
        self._rows: dict[int, Row] = {}
        self._worked = 0.0
        self._compiled_before = engine.compile_seconds
        longest = 1 + max(len(ids) for _, ids in asked)
        engine.check_memory(
            longest,
            max(len(ids) + request.max_new_tokens for request, ids in asked),
            held=self._conversation.device_bytes,
        )
        if engine.batch_size == 1:
            self._first = self._single(*asked[0])
            self._state = self._first[0]
        else:
            self._first = None
            self._state = self._create([None] * engine.batch_size, engine.capacity(longest))
        self._decode = self._decode_program()

    def updates(self) -> Iterator[Update]:
        """Everything that is found, until all requests have ended."""
        waiting, free = deque(enumerate(self._asked)), deque(range(self._engine.batch_size))
        try:
            while waiting or self._rows:
                while waiting and free:
                    index, (request, ids) = waiting.popleft()
                    self._admit(free.popleft(), index, request, ids)
                finish_B = np.array(self._state.finish_B)
                for row in list(self._rows):
                    update = self._look(row, finish_B)
                    if update is None:
                        continue
                    if update.completion is not None:
                        free.append(row)
                    yield update
                finish_B = jax.device_put(finish_B, self._state.finish_B.sharding)
                self._state = dataclasses.replace(self._state, finish_B=finish_B)
                if self._rows and not (waiting and free):
                    self._advance()
        finally:
            if self._engine.batch_size == 1:
                # Before its prompt is read, a row has what it shares with the text before.
                count = self._first and self._first[1]
                self._conversation.keep(self._state, self._engine.model, count)

    def _admit(self, row: int, index: int, request: Request, ids: list[int]) -> None:
        """Reads a prompt and gives it a row."""
        alone, programs = self._engine.batch_size == 1, self._engine.programs
        if self._first is not None:
            single, known = self._first
        else:
            if alone:
                self._conversation.keep(self._state, self._engine.model)
            single, known = self._single(request, ids)
        chunk = chunk_size(len(ids) - known, single.capacity)
        read = programs.get(partial(prefill, chunk=chunk, depth=self._depth), single, np.int32(0))
        single, seconds = _timed(read, single, np.int32(known))
        self._first = None
        if alone:
            self._state = single
            self._decode = self._decode_program()
        else:
            put = programs.get(partial(insert), self._state, single, np.int32(0))
            self._state, more = _timed(put, self._state, single, np.int32(row))
            self._conversation.keep(single, self._engine.model)
            seconds += more
        self._worked += seconds
        self._engine.prefill_seconds += seconds
        text = RowText(self._engine.tokenizer, ids, request.stop)
        looked = (self._worked, 0)
        self._rows[row] = Row(index, request, ids, text, seconds, self._worked, looked)

    def _look(self, row: int, finish_B: np.ndarray) -> Update | None:
        """Reads what is new in a row, if it has ended or somebody waits for it; marks in `finish_B`
        that it has ended."""
        live = self._rows[row]
        cancelled = self._cancelled()
        waits = self._stream or live.request.stop or cancelled
        if finish_B[row] == RUNNING and not waits:
            return None
        whole = Trace.of(self._state, row, len(live.ids))
        text, trace, reason = live.text.look(whole, int(finish_B[row]))
        if reason is None and cancelled:
            rest, trace, reason = live.text.look(trace, STOP)
            text, reason = text + rest, "interrupt"
        completion = None
        if reason is not None:
            if finish_B[row] == EOS and trace.tokens_n[-1] in live.request.stop_ids:
                reason = "stop"
            finish_B[row] = finish_B[row] or STOP
            # Rounds behind a stop string, which is only seen at the next look, are not the text's.
            seconds, rounds = live.looked
            kept = trace.rounds - rounds, whole.rounds - rounds
            share = kept[0] / kept[1] if kept[1] else 1.0
            ended = seconds + share * (self._worked - seconds)
            completion = self._complete(live, trace, reason, ended - live.began)
            del self._rows[row]
        live.looked = (self._worked, whole.rounds)
        return Update(live.index, text, trace, completion)

    def _advance(self) -> None:
        """Rounds, until a row ends or it is time to look."""
        self._grow()
        looks = self._stream or any(live.request.stop for live in self._rows.values())
        rounds = np.int32(ROUNDS_PER_LOOK if looks else ALL_ROUNDS)
        self._state, seconds = _timed(self._decode, self._state, rounds, self._arguments)
        self._worked += seconds
        self._engine.decode_seconds += seconds

    def _grow(self) -> None:
        """Gives the rows the next capacity if one of them has no room for another round."""
        state, engine = self._state, self._engine
        length_B, finish_B = np.array(state.length_B), np.array(state.finish_B)
        longest = int(length_B[finish_B == RUNNING].max())
        if longest + self._strategy.slack <= state.capacity:
            return
        larger = partial(grow, capacity=engine.capacity(longest))
        program = engine.programs.get(larger, state, donate=False)
        self._state, seconds = _timed(program, state)
        del state  # the smaller cache, before anything is compiled
        self._worked += seconds
        engine.decode_seconds += seconds
        self._decode = self._decode_program()

    def _decode_program(self) -> Callable:
        """The loop for the capacity of the rows."""
        function = partial(decode, strategy=self._strategy)
        return self._engine.programs.get(function, self._state, np.int32(0), self._arguments)

    def _complete(self, live: Row, trace: Trace, reason: str, seconds: float) -> Completion:
        """What a row that has ended gave, and the seconds that it took."""
        sampling = live.request.sampling
        if not live.request.log_probs:
            trace = dataclasses.replace(trace, log_probs_n=None)
        return Completion.of(
            trace,
            strategy=self._strategy,
            seed=sampling.seed if sampling.temperature else None,
            prompt=self._engine.tokenizer.decode(live.ids),
            text=live.text.text,
            num_prompt_tokens=len(live.ids),
            prefill_seconds=live.prefill_seconds,
            decode_seconds=seconds,
            compile_seconds=self._engine.compile_seconds - self._compiled_before,
            finish_reason=reason,
        )

    def _single(self, request: Request, ids: list[int]) -> tuple[DecodeState, int]:
        """A state with this row, and how many of its tokens its cache holds. Its capacity is that
        of the batch; a row alone begins with what its prompt needs."""
        alone = self._engine.batch_size == 1
        capacity = self._engine.capacity(len(ids) + 1) if alone else self._state.capacity
        cache, known = self._conversation.take(ids, capacity, self._depth, self._engine.model)
        capacity = capacity if cache is None else cache.capacity
        return self._create([(request, ids)], capacity, cache), known

    def _create(self, rows, capacity: int, cache=None) -> DecodeState:
        """A state of these requests and ids, None for a row that has ended from the start; it fits
        the programs for all that is asked."""
        engine, requests = self._engine, [request for request, _ in self._asked]
        vocab = engine.model.config.vocab_size
        # A tokenizer may name ends that the model does not have: nothing ends there.
        own = () if engine.ignore_end else engine.tokenizer.eos_ids
        own = [token for token in own if 0 <= token < vocab]

        def ends(request: Request) -> list[int]:
            return list(dict.fromkeys([*own, *request.stop_ids]))

        room = max(1, *(len(ends(request)) for request in requests))
        room = -(-room // STOP_IDS) * STOP_IDS
        filler = (Request(prompt=(), max_new_tokens=0), [0])
        rows = [filler if row is None else row for row in rows]
        stop_ids = [ends(request) for request, _ in rows]
        return DecodeState.create(
            engine.model.config,
            [ids for _, ids in rows],
            [request.max_new_tokens for request, _ in rows],
            [ids + [-1] * (room - len(ids)) for ids in stop_ids],
            capacity=capacity,
            num_layers=self._depth,
            dtype=engine.model.dtype,
            stacked=engine.model.is_stacked,
            sampling=[request.sampling for request, _ in rows],
            among=[request.sampling for request in requests],
            log_probs=any(request.log_probs for request in requests),
            cache=cache,
            mesh=engine.mesh,
        )


def chunk_size(unread: int, capacity: int) -> int:
    """The size in which so many tokens are read into a cache of `capacity` slots."""
    sizes = [size for size in CHUNKS if size <= capacity]
    return next((size for size in sizes if size >= unread), sizes[-1])


def _timed(program: Callable, *arguments) -> tuple[DecodeState, float]:
    begin = time.perf_counter()
    state = jax.block_until_ready(program(*arguments))
    return state, time.perf_counter() - begin
