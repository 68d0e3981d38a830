"""Engine: a model with its compiled programs, which decodes requests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from jax.sharding import Mesh

from lsjax.config import GREEDY, Kernels, Sampling, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.batching import ContinuousBatch
from lsjax.decoding.compiler import Programs
from lsjax.decoding.completion import Completion, Update
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.runtime import Runtime
from lsjax.decoding.strategy import Autoregressive, Strategy
from lsjax.model.protocol import DecoderModel, Sizes

Prompt = str | Sequence[int] | Request


class Engine:
    """A model, its tokenizer, a strategy and the programs compiled for them.

    batch_size: rows that decode side by side; the next request takes an ended row at once.
    max_length: prompt and new tokens of a row; the model's context by default. ignore_end: decode
    past the end of a text. min_length: tokens that a row's cache has room for from the start.
    long_lived: compile more programs to decode many batches faster. Prompts are read side by side,
    equal ones once, when a quarter of the rows is free. Once no request waits, ended rows leave the
    batch, half of it at a time. Caches of short texts have fewer slots.
    mesh: devices to decode on (lsjax/sharding.py). lay_out: let the compiler choose layouts of the
    weights on accelerators. If the caller keeps `model`, weights with a new layout are then in
    memory twice. kernels: "reference" uses no tuned code (docs/performance.md). track: wraps the
    timings of an adaptive strategy, for a progress bar. compiling: entered with a line that says
    what is compiled, while it is.

    Raises ConfigError if the strategy or length does not fit the model, or the batch the mesh.
    Raises TokenizerError if the tokenizer does not fit the model.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        strategy: Strategy | None = None,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        ignore_end: bool = False,
        min_length: int = 0,
        long_lived: bool = False,
        mesh: Mesh | None = None,
        lay_out: bool = True,
        kernels: Kernels = "auto",
        track: Callable[[Sequence], Iterable] = iter,
        compiling: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        strategy = strategy or Autoregressive()
        check_settings(model, strategy, batch_size=batch_size, max_length=max_length, mesh=mesh)
        self.tokenizer = tokenizer.fitted(model.vocab_size)
        self.batch_size = batch_size
        self.max_length = model.max_context if max_length is None else max_length
        self.ignore_end, self.long_lived = ignore_end, long_lived
        self.runtime = Runtime(
            model,
            mesh,
            batch_size=batch_size,
            min_length=min_length,
            lay_out=lay_out,
            kernels=kernels,
            track=track,
            compiling=compiling,
        )
        self.use(strategy)

    def use(self, strategy: Strategy) -> None:
        """Decodes with another strategy from now on. Raises ConfigError if it does not fit."""
        strategy.validate(self.model)
        self.strategy = strategy

    def use_model(self, model: DecoderModel) -> None:
        """Decodes with another model from now on. Raises ConfigError if its form differs."""
        self.runtime.use_model(model)

    @property
    def model(self) -> DecoderModel:
        """The model that decodes, on the mesh and laid out for its programs."""
        return self.runtime.model

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        return self.runtime.programs

    @property
    def decode_seconds(self) -> float:
        """Seconds of all rounds so far."""
        return self.runtime.decode_seconds

    def memory_bytes(self, total: int) -> tuple[int, int]:
        """Bytes of the model and of the cache for rows of `total` tokens, on all devices."""
        return self.runtime.memory_bytes(total, self.strategy)

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
        completions: list[Completion | None] = [None] * len(prompts)
        batch = self.batch(prompts, sampling=sampling, **options) if completions else None
        for update in batch.updates() if batch else ():
            if update.completion is not None:
                completions[update.index] = update.completion
                on_completion(update.index, update.completion)
        return completions

    def batch(
        self, prompts: Sequence[Prompt], *, sampling: Sampling = GREEDY, **options
    ) -> ContinuousBatch:
        """A batch to which prompts can be added while others run, with `add`.

        Its `updates` decode, and yield completions as texts end. Arguments as for `generate`.
        """
        seeds = [sampling.of_text(index) for index in range(len(prompts))]
        pairs = zip(prompts, seeds, strict=True)
        return self._batch([self._request(one, sampling=own, **options) for one, own in pairs])

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
        """Yields an update whenever one prompt's new text is read.

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
        yield from self._batch([request], **rest).updates()

    def _batch(self, requests: Sequence[Request], **options) -> ContinuousBatch:
        own = dict(ignore_end=self.ignore_end, long_lived=self.long_lived, encode=self._request)
        options |= own
        return ContinuousBatch(self.runtime, self.strategy, self.tokenizer, requests, **options)

    def _request(self, prompt: Prompt, **options) -> Request:
        """The request with its prompt as token ids."""
        if not isinstance(prompt, Request):
            ids = prompt if isinstance(prompt, str) else list(prompt)
            prompt = Request(prompt=ids, **options)
        ids = encode_prompt(prompt, self.tokenizer, self.model, self.max_length)
        most = self.strategy.depth(self.model)
        check(
            max(prompt.exits, default=1) <= most,
            f"exits {list(prompt.exits)} of a request are out of range: {self.strategy.name} runs "
            f"{most} layers, so use 1..{most}",
        )
        return replace(prompt, prompt=ids)


def check_settings(
    sizes: Sizes,
    strategy: Strategy,
    *,
    batch_size: int,
    max_length: int | None,
    mesh: Mesh | None,
) -> None:
    """Raises ConfigError if an Engine could not work; needs no weights."""
    strategy.validate(sizes)
    data_axis = 1 if mesh is None else mesh.shape["data"]
    check(batch_size >= 1, f"batch size {batch_size} is below 1: choose --batch-size 1 or more")
    check(
        batch_size == 1 or batch_size % data_axis == 0,  # a single row is replicated
        f"batch size {batch_size} is not a multiple of the mesh's data axis of {data_axis}: choose "
        "such a multiple as --batch-size, or another --mesh.data",
    )
    check(
        max_length is None or 2 <= max_length <= sizes.max_context,
        f"max length {max_length} is out of range: use --max-length 2..{sizes.max_context} (the "
        "model's context)",
    )
