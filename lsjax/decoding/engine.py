"""Holds what decoding needs, and takes requests."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from lsjax.config import check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.batching import ContinuousBatch, Conversation
from lsjax.decoding.completion import Completion, Update
from lsjax.decoding.programs import Programs
from lsjax.decoding.request import Request, check_settings, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.state import Strategy
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed, sharding_of

MIN_CAPACITY = 256  # slots of a row's cache: this, or a larger power of two
# Plus a multiple of this for drafts: strategies then share programs, and GPUs need no padding.
SLACK = 64


class Engine:
    """A model, its tokenizer, a strategy and the programs compiled for them.

    batch_size: rows that decode side by side; what a row gives does not depend on the others. A
    row that ends is given the next request at once. max_length: prompt and new tokens of a row;
    the model's context by default. ignore_end: decode behind the end of a text, for measurements.
    min_capacity: slots of a row's cache at least. mesh: devices to decode on (lsjax/sharding.py).
    lay_out: let the compiler choose how weights are laid out on accelerators. It copies those that
    change, so whoever keeps `model` keeps these twice.

    Raises ConfigError where the strategy or the length does not fit the model, or the batch not
    the mesh; TokenizerError where the tokenizer does not fit the model.
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
    ):
        config, strategy = model.config, strategy or Autoregressive()
        check_settings(
            config,
            strategy,
            batch_size=batch_size,
            max_length=max_length,
            data_axis=1 if mesh is None else mesh.shape["data"],
        )
        self.tokenizer = tokenizer.fitted(config.vocab_size)
        self.batch_size = batch_size
        self.max_length = config.max_context if max_length is None else max_length
        self.ignore_end = ignore_end
        self.min_capacity = min_capacity
        self.mesh = mesh
        self.programs = Programs(placed(model, mesh), mesh, lay_out=lay_out)
        self.decode_seconds = 0.0  # of all rounds so far
        self.use(strategy)

    def use(self, strategy: Strategy) -> None:
        """Decodes with another strategy from now on; programs that fit it are used again.

        Raises ConfigError where it does not fit the model.
        """
        strategy.validate(self.model.config)
        self.strategy = strategy
        self.arguments = placed(strategy.arguments(self.model), self.mesh)

    def use_model(self, model: Llama) -> None:
        """Decodes with another model of the same form from now on, by the same programs.

        Raises ConfigError where the form is not the same.
        """
        self.programs.use(placed(model, self.mesh))
        self.use(self.strategy)

    @property
    def model(self) -> Llama:
        """The model that decodes, on the mesh and laid out for its programs."""
        return self.programs.model

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self.programs)

    @property
    def compile_seconds(self) -> float:
        """Spent on them."""
        return self.programs.compile_seconds

    def capacity(self, length: int) -> int:
        """Slots of a row's cache while it has `length` tokens."""
        return cache_slots(max(length, self.min_capacity), self.strategy)

    def memory_bytes(self, total: int) -> tuple[int, int]:
        """Bytes of the model and of the cache for rows of `total` tokens, on all devices."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        rows, slots = self._rows, self.capacity(total)
        layers = self.strategy.depth(config)
        cache = config.cache_bytes(rows, slots, itemsize) * layers // config.num_layers
        return config.num_params * itemsize, cache

    def check_memory(self, first: int, total: int, held: int = 0) -> None:
        """Raises ConfigError where the devices can't hold the cache for rows that begin with
        `first` tokens and end with `total`. While the cache grows, the old and the new one are
        both in memory. held: bytes in use on each device that will be free then.
        """
        free = free_memory()
        if free is None:
            return
        slots = last = self.capacity(total)
        if self.capacity(first) < last:
            slots += self.capacity(last // 2 - self.strategy.slack)
        config = self.model.config
        shape = (self._rows, config.num_kv_heads, slots, config.head_dim)
        if self.mesh is not None:
            shape = sharding_of("keys.0", shape, self.mesh).shard_shape(shape)
        layers = self.strategy.depth(config)
        needed = 2 * layers * math.prod(shape) * self.model.dtype.itemsize
        check(
            needed <= free + held,
            f"the cache for texts of {total} tokens needs {needed / 1e6:,.0f} MB on each device, "
            f"but {(free + held) / 1e6:,.0f} MB are free: lower --max-new-tokens or --batch-size, "
            "or shorten the prompts",
        )

    @property
    def _rows(self) -> int:
        """Rows of a cache; beside a batch there is a row in which the next prompt is read."""
        return self.batch_size + (self.batch_size > 1)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        on_completion: Callable[[int, Completion], None] | None = None,
        **options,
    ) -> list[Completion]:
        """Continues every prompt; completions in the same order.

        prompts: text, token ids, or a `Request`, to which the other arguments do not apply.
        sampling: one for each prompt, or one for all. Prompt number i then uses the seed + i, so
        equal prompts give different texts. options: the other fields of `Request`.
        on_completion: called with index and completion as each one ends.

        Raises ConfigError for what `Request` and `encode_prompt` refuse.
        """
        if isinstance(sampling, Sampling):
            seeds = [(sampling.seed + i) % 2**32 for i in range(len(prompts))]
            sampling = [replace(sampling, seed=seed) for seed in seeds]
        check(
            len(sampling) == len(prompts),
            f"{len(sampling)} samplings for {len(prompts)} prompts: give one, or one for each",
        )
        asked = [
            self._ask(prompt, sampling=own, **options)
            for prompt, own in zip(prompts, sampling, strict=True)
        ]
        completions: list[Completion | None] = [None] * len(asked)
        for update in ContinuousBatch(self, asked).updates() if asked else ():
            if update.completion is not None:
                completions[update.index] = update.completion
                if on_completion is not None:
                    on_completion(update.index, update.completion)
        return completions

    def stream(
        self, prompt: str | Sequence[int] | Request, **options
    ) -> Iterator[str | Completion]:
        """Pieces of one prompt's new text as they are found, and at the end its Completion.

        Pieces end between characters, and text that may be the beginning of a stop string waits.
        options: as for `watch`.
        """
        for update in self.watch(prompt, **options):
            if update.text:
                yield update.text
            if update.completion is not None:
                yield update.completion

    def watch(
        self,
        prompt: str | Sequence[int] | Request,
        *,
        conversation: Conversation | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        **options,
    ) -> Iterator[Update]:
        """What every look at one prompt's new text finds.

        conversation: keeps the cache for the next text, also where this one is left early; it
        needs an engine with one row. cancelled: ends the text, with finish_reason "interrupt", as
        soon as it is true. options: the other fields of `Request`.
        """
        check(
            conversation is None or self.batch_size == 1,
            f"a conversation needs an engine with batch_size 1, not {self.batch_size}",
        )
        asked = [self._ask(prompt, **options)]
        yield from ContinuousBatch(
            self, asked, stream=True, conversation=conversation, cancelled=cancelled
        ).updates()

    def _ask(self, prompt: str | Sequence[int] | Request, **options) -> tuple[Request, list[int]]:
        """The request and its prompt's ids."""
        if not isinstance(prompt, Request):
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
            ids = prompt if isinstance(prompt, str) else list(prompt)
            prompt = Request(prompt=ids, **options)
        return prompt, self.encode(prompt)

    def encode(self, request: Request) -> list[int]:
        """The token ids of its prompt. Raises ConfigError for what `encode_prompt` refuses."""
        return encode_prompt(
            request.prompt,
            self.tokenizer,
            self.model.config,
            max_new_tokens=request.max_new_tokens,
            max_length=self.max_length,
            stop_ids=request.stop_ids,
        )


def cache_slots(length: int, strategy: Strategy) -> int:
    """Slots of a cache in which rows of `length` tokens have room for another round: sizes that
    double, so that few programs are needed and less than half of the slots stay empty for long."""
    slots, more = MIN_CAPACITY, -(-strategy.slack // SLACK) * SLACK
    while slots + more < length + strategy.slack:
        slots *= 2
    return slots + more


def free_memory() -> int | None:
    """Bytes that the first device has left; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]
