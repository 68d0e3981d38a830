"""Engine: a model with its compiled programs, which decodes requests."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from lsjax.config import Kernels, LlamaConfig, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.batching import ContinuousBatch, Conversation
from lsjax.decoding.completion import Completion, Update
from lsjax.decoding.programs import Programs
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.stopwatch import round_seconds
from lsjax.decoding.strategy import Autoregressive, Strategy
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed, sharding_of

MIN_CAPACITY = 256  # slots of a row's cache: this, or a larger power of two
# Plus a multiple of this for drafts, so that strategies share programs and GPUs need no padding.
SLACK = 64
Prompt = str | Sequence[int] | Request


class Engine:
    """A model, its tokenizer, a strategy and the programs compiled for them.

    batch_size: rows that decode side by side; the next request takes an ended row at once.
    max_length: prompt and new tokens of a row; the model's context by default. ignore_end: decode
    past the end of a text. min_capacity: fewest slots of a row's cache. mesh: devices to decode on
    (lsjax/sharding.py). lay_out: let the compiler choose layouts of the weights on accelerators.
    If the caller keeps `model`, weights with a new layout are then in memory twice. kernels:
    "reference" uses no tuned code (docs/performance.md). track: wraps the timings of an adaptive
    strategy, for a progress bar.

    Raises ConfigError if the strategy or length does not fit the model, or the batch the mesh.
    Raises TokenizerError if the tokenizer does not fit the model.
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
        mesh: Mesh | None = None,
        lay_out: bool = True,
        kernels: Kernels = "auto",
        track: Callable[[Sequence], Iterable] = iter,
    ):
        config, strategy = model.config, strategy or Autoregressive()
        check_settings(config, strategy, batch_size=batch_size, max_length=max_length, mesh=mesh)
        self.tokenizer = tokenizer.fitted(config.vocab_size)
        self.batch_size = batch_size
        self.max_length = config.max_context if max_length is None else max_length
        self.ignore_end = ignore_end
        self.min_capacity = min_capacity
        self.mesh = mesh
        self.kernels = kernels
        model = placed(model, mesh)
        self.programs = Programs(model, mesh, lay_out=lay_out, kernels=kernels)
        self.decode_seconds = 0.0  # of all rounds so far
        self.track = track
        self._seconds: dict[tuple[Strategy, int], Array] = {}  # of rounds, by slots
        self.use(strategy)

    def use(self, strategy: Strategy) -> None:
        """Decodes with another strategy from now on. Raises ConfigError if it does not fit."""
        strategy.validate(self.model.config)
        self.strategy = strategy
        self.arguments = placed(strategy.arguments(self.model), self.mesh)

    def use_model(self, model: Llama) -> None:
        """Decodes with another model from now on. Raises ConfigError if its form differs."""
        self.programs.use(placed(model, self.mesh))
        self.use(self.strategy)

    @property
    def model(self) -> Llama:
        """The model that decodes, on the mesh and laid out for its programs."""
        return self.programs.model

    def capacity(self, length: int, strategy: Strategy | None = None) -> int:
        """Slots of a row's cache for `length` tokens. strategy: by default the engine's."""
        return cache_slots(max(length, self.min_capacity), strategy or self.strategy)

    def arguments_for(self, capacity: int, budget: float) -> Any:
        """Arguments of the strategy's program for rows of `capacity` slots. Those of an adaptive
        strategy include the seconds of its rounds. If these are neither given nor stored, they are
        measured in `budget` seconds."""
        if not isinstance(self.strategy, Adaptive) or self.strategy.seconds is not None:
            return self.arguments
        key = self.strategy, capacity
        if key not in self._seconds:
            seconds_SD = jnp.asarray(round_seconds(self, capacity, budget), jnp.float32)
            self._seconds[key] = placed(seconds_SD, self.mesh)
        return self._seconds[key], self.arguments[1]

    def memory_bytes(self, total: int) -> tuple[int, int]:
        """Bytes of the model and of the cache for rows of `total` tokens, on all devices."""
        model_bytes = self.model.config.num_params * self.model.dtype.itemsize
        return model_bytes, self._cache_bytes(self.capacity(total), None)

    def check_memory(self, first: int, total: int, held: int = 0) -> None:
        """Raises ConfigError if the devices can't hold the cache for rows that begin with `first`
        tokens and end with `total`: the last one, and the one before it, while it grows. held:
        bytes in use on each device that are freed first."""
        free, last = free_memory() + held, self.capacity(total)
        slots = last
        if self.capacity(first) < last:
            slots += self.capacity(last // 2 - self.strategy.slack)
        needed = self._cache_bytes(slots, self.mesh)
        check(
            needed <= free,
            f"the cache for texts of {total} tokens needs {needed / 1e6:,.0f} MB on each device, "
            f"but {free / 1e6:,.0f} MB are free: lower --max-new-tokens or --batch-size, "
            "or shorten the prompts",
        )

    def _cache_bytes(self, slots: int, mesh: Mesh | None) -> int:
        """On each device of a mesh. A batch has one extra row, which reads the next prompt."""
        config, rows = self.model.config, self.batch_size + (self.batch_size > 1)
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        if mesh is not None:
            shape = sharding_of("keys.0", shape, mesh).shard_shape(shape)
        return 2 * self.strategy.depth(config) * math.prod(shape) * self.model.dtype.itemsize

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling = GREEDY,
        on_completion: Callable[[int, Completion], None] = lambda index, completion: None,
        **options,
    ) -> list[Completion]:
        """Continues every prompt; returns completions in the same order.

        prompts: text, token ids, or a `Request`, to which the other arguments do not apply.
        sampling: prompt number i uses its seed + i, so equal prompts give different texts.
        options: the other fields of `Request`. on_completion: called with index and completion
        when a text ends.

        Raises ConfigError as `Request` and `encode_prompt` do.
        """
        requests = []
        for index, prompt in enumerate(prompts):
            own = sampling.of_text(index)
            requests.append(self._request(prompt, sampling=own, **options))
        completions: list[Completion | None] = [None] * len(requests)
        for update in ContinuousBatch(self, requests).updates() if requests else ():
            if update.completion is not None:
                completions[update.index] = update.completion
                on_completion(update.index, update.completion)
        return completions

    def stream(self, prompt: Prompt, **options) -> Iterator[str | Completion]:
        """Yields pieces of one prompt's new text, and at the end its Completion.

        Pieces are complete characters. The possible beginning of a stop string is held back.
        options: as for `watch`.
        """
        for update in self.watch(prompt, **options):
            if update.text:
                yield update.text
            if update.completion is not None:
                yield update.completion

    def watch(
        self,
        prompt: Prompt,
        *,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        **options,
    ) -> Iterator[Update]:
        """Yields an update for every look at one prompt's new text.

        conversation: keeps the cache for the next text, even if this one stops early. It needs an
        engine with one row. cancelled: once it returns true, the text ends with finish_reason
        "interrupt". options: the other fields of `Request`.
        """
        check(
            conversation is None or self.batch_size == 1,
            f"a conversation needs an engine with batch_size 1, not {self.batch_size}",
        )
        request = self._request(prompt, **options)
        rest = dict(stream=True, conversation=conversation, cancelled=cancelled)
        yield from ContinuousBatch(self, [request], **rest).updates()

    def _request(self, prompt: Prompt, **options) -> Request:
        """The request with its prompt as token ids."""
        if not isinstance(prompt, Request):
            ids = prompt if isinstance(prompt, str) else list(prompt)
            prompt = Request(prompt=ids, **options)
        ids = encode_prompt(prompt, self.tokenizer, self.model.config, self.max_length)
        return replace(prompt, prompt=ids)


def check_settings(
    config: LlamaConfig,
    strategy: Strategy,
    *,
    batch_size: int,
    max_length: int | None,
    mesh: Mesh | None,
) -> None:
    """Raises ConfigError if an Engine could not work; needs no weights."""
    strategy.validate(config)
    data_axis = 1 if mesh is None else mesh.shape["data"]
    check(batch_size >= 1, f"batch size {batch_size} is below 1: choose --batch-size 1 or more")
    check(
        batch_size == 1 or batch_size % data_axis == 0,  # a single row is replicated
        f"batch size {batch_size} is not a multiple of the mesh's data axis of {data_axis}: choose "
        "such a multiple as --batch-size, or another --mesh.data",
    )
    check(
        max_length is None or 2 <= max_length <= config.max_context,
        f"max length {max_length} is out of range: use --max-length 2..{config.max_context} (the "
        "model's context)",
    )


def cache_slots(length: int, strategy: Strategy) -> int:
    """Slots of a cache in which rows of `length` tokens have room for another round. Sizes double,
    so that few programs are needed and less than half of the slots stay empty for long."""
    slots, more = MIN_CAPACITY, -(-strategy.slack // SLACK) * SLACK
    while slots + more < length + strategy.slack:
        slots *= 2
    return slots + more


def free_memory() -> float:
    """Free bytes of the first device; infinite if the device does not report them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
