"""From prompts to completions: batches, streaming, and the programs compiled for them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import check
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.completion import Completion, RowText, Trace
from lsjax.decoding.loops import decode, prefill
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.state import RUNNING, STOP, DecodeState, Strategy
from lsjax.model.llama import Llama

# A prompt is read in chunks of the smallest of these that holds it, a longer one in several of
# the largest: as many programs as there are sizes, whatever the prompts.
CHUNKS = (32, 64, 128, 256, 512)
MIN_CAPACITY = 512  # slots of a row's cache: this, or a larger power of two
SLACK = 16  # and a multiple of this for drafts beyond the end, so that strategies share programs
# Rounds between two looks at the text, where somebody waits for it or a stop string may be in it.
ROUNDS_PER_LOOK = 4


class Engine:
    """A model, its tokenizer, a strategy and the programs compiled for them.

    batch_size: rows that decode side by side; what a row gives does not depend on the others.
    max_length: prompt and new tokens of a row; the model's context by default.
    ignore_end: decode behind the end of a text, for measurements.
    min_capacity: slots of a row's cache at least.

    Raises ConfigError where the strategy or the length does not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        strategy: Strategy | None = None,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        ignore_end: bool = False,
        min_capacity: int = 0,
    ):
        config = model.config
        self.strategy = Autoregressive() if strategy is None else strategy
        check_settings(
            config, tokenizer, self.strategy, batch_size=batch_size, max_length=max_length
        )
        self.max_length = config.max_context if max_length is None else max_length
        self.model = model
        self._arguments = self.strategy.arguments(model)
        # A flat list is quicker to hand over than a module (70 us against 0.5 ms).
        self._leaves, self._structure = jax.tree.flatten(model)
        self.tokenizer = tokenizer
        self.ignore_end = ignore_end
        self.min_capacity = min_capacity
        self.batch_size = batch_size
        self.compile_seconds = 0.0  # of all programs so far
        self.decode_seconds = 0.0  # of all batches so far, after their first tokens
        self._programs: dict[tuple, Callable] = {}

    def use(self, strategy: Strategy) -> None:
        """Decodes with another strategy from now on; programs that fit it are used again.

        Raises ConfigError where it does not fit the model.
        """
        strategy.validate(self.model.config)
        self.strategy = strategy
        self._arguments = strategy.arguments(self.model)

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def capacity(self, total: int) -> int:
        """Slots of a row's cache for `total` tokens: few sizes, so that few programs are needed."""
        slots = MIN_CAPACITY
        while slots < max(total, self.min_capacity):
            slots *= 2
        return slots + -(-self.strategy.slack // SLACK) * SLACK

    def memory_bytes(self, total: int) -> tuple[int, int]:
        """Bytes of the model and of the cache for rows of `total` tokens."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        layers = self.strategy.depth(config) / config.num_layers
        cache = config.cache_bytes(self.batch_size, self.capacity(total), itemsize)
        return config.num_params * itemsize, int(cache * layers)

    def encode(self, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        """`encode_prompt` for this engine."""
        return encode_prompt(
            prompt,
            self.tokenizer,
            self.model.config,
            max_new_tokens=max_new_tokens,
            max_length=self.max_length,
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Continues every prompt (text or token ids); completions in the same order.

        sampling: of every prompt, or one for each; greedy by default. A text depends on its own
        prompt, settings and seed only.
        stop: strings that end a text, wherever token borders lie; they are cut off.
        on_completion: called with index and completion as each one ends.
        """
        encoded = [self.encode(prompt, max_new_tokens) for prompt in prompts]
        samplings = [sampling] * len(encoded) if isinstance(sampling, Sampling) else list(sampling)
        check(
            len(samplings) == len(encoded),
            f"{len(samplings)} samplings for {len(encoded)} prompts: give one, or one for each",
        )
        completions: list[Completion | None] = [None] * len(encoded)
        for first in range(0, len(encoded), self.batch_size):
            part = slice(first, first + self.batch_size)
            for row, _, completion in self._run(
                encoded[part], samplings[part], max_new_tokens, tuple(stop), look=bool(stop)
            ):
                if completion is not None:
                    completions[first + row] = completion
                    if on_completion is not None:
                        on_completion(first + row, completion)
        return completions

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
    ) -> Iterator[str | Completion]:
        """Pieces of one prompt's new text as they are found, and at the end its Completion.

        Pieces end between characters, and text that may be the beginning of a stop string waits.
        """
        ids = self.encode(prompt, max_new_tokens)
        for _, piece, completion in self._run(
            [ids], [sampling], max_new_tokens, tuple(stop), look=True
        ):
            if piece:
                yield piece
            if completion is not None:
                yield completion

    def _run(
        self,
        prompts: list[list[int]],
        samplings: list[Sampling],
        max_new_tokens: int,
        stop: tuple[str, ...],
        look: bool,
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """Decodes one batch; yields (row, new text, its completion once it has ended)."""
        before = self.compile_seconds
        strategy, arguments = self.strategy, self._arguments  # `use` may come in between
        state = self._start(prompts, samplings, max_new_tokens)
        rounds = np.int32(ROUNDS_PER_LOOK if look else np.iinfo(np.int32).max)
        chunk = next((size for size in CHUNKS if size >= max(map(len, prompts))), CHUNKS[-1])
        depth = strategy.depth(self.model.config)
        run_prefill = self._compiled(partial(prefill, chunk=chunk, depth=depth), state)
        run_decode = self._compiled(partial(decode, strategy=strategy), state, rounds, arguments)
        compile_seconds = self.compile_seconds - before

        state, prefill_seconds = _timed(run_prefill, state)
        decode_seconds = 0.0
        texts = {row: RowText(self.tokenizer, ids, stop) for row, ids in enumerate(prompts)}
        while True:
            finish_B = np.array(state.finish_B)
            for row in [row for row in texts if look or finish_B[row] != RUNNING]:
                trace = Trace.of(state, row, len(prompts[row]))
                piece, trace, reason = texts[row].look(trace, int(finish_B[row]))
                completion = None
                if reason is not None:
                    finish_B[row] = finish_B[row] or STOP
                    completion = Completion.of(
                        trace,
                        strategy=strategy,
                        seed=samplings[row].seed if samplings[row].temperature else None,
                        prompt=self.tokenizer.decode(prompts[row]),
                        text=texts.pop(row).text,
                        num_prompt_tokens=len(prompts[row]),
                        prefill_seconds=prefill_seconds,
                        decode_seconds=decode_seconds,
                        compile_seconds=compile_seconds,
                        finish_reason=reason,
                    )
                yield row, piece, completion
            if not texts:
                return
            state = dataclasses.replace(state, finish_B=jnp.asarray(finish_B))
            state, seconds = _timed(run_decode, state, rounds, arguments)
            decode_seconds += seconds
            self.decode_seconds += seconds

    def _start(
        self, prompts: list[list[int]], samplings: list[Sampling], max_new_tokens: int
    ) -> DecodeState:
        """Rows for a batch; what is missing to the batch size is filled with rows that ended."""
        fillers = self.batch_size - len(prompts)
        total = max(map(len, prompts)) + max_new_tokens
        return DecodeState.create(
            self.model.config,
            prompts + [[0]] * fillers,
            [max_new_tokens] * len(prompts) + [0] * fillers,
            np.array([-1] if self.ignore_end else self.tokenizer.eos_ids or [-1]),
            capacity=self.capacity(total),
            slack=self.strategy.slack,
            num_layers=self.strategy.depth(self.model.config),
            dtype=self.model.dtype,
            stacked=self.model.is_stacked,
            sampling=samplings + [GREEDY] * fillers,
        )

    def _compiled(self, function: partial, state: DecodeState, *rest) -> Callable:
        """The program of `function(model, state, *rest)` for such a state; it consumes the state
        (its buffers are donated)."""
        static = (getattr(value, "program", value) for value in function.keywords.values())
        key = (function.func, *static, state.tokens_BS.shape, jax.tree.structure(state))
        if key not in self._programs:

            def run(leaves, state, *rest):
                return function(jax.tree.unflatten(self._structure, leaves), state, *rest)

            begin = time.perf_counter()
            lowered = jax.jit(run, donate_argnums=1).lower(self._leaves, state, *rest)
            self._programs[key] = lowered.compile()
            self.compile_seconds += time.perf_counter() - begin
        return partial(self._programs[key], self._leaves)


def _timed(program: Callable, *arguments) -> tuple[DecodeState, float]:
    begin = time.perf_counter()
    state = jax.block_until_ready(program(*arguments))
    return state, time.perf_counter() - begin
