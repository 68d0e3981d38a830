"""What programs share that measure self-speculation on a grid of exits and draft lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsjax.checkpoints import assemble, open_checkpoint
from lsjax.cli.prompts import PromptArguments, read_encoded, read_prompts
from lsjax.cli.setup import cache_directory, choose_dtype, machine
from lsjax.cli.strategies import in_one_program
from lsjax.config import check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.calibration import calibrated
from lsjax.decoding.cost import Costs
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.identity_tail import identity_tail
from lsjax.evaluation.speed import Row
from lsjax.model.llama import stacked

PROMPTS = (
    "Once upon a time, there was a little girl named Lily who",
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It",
    "Photosynthesis is the process by which plants",
)


@dataclass(frozen=True, kw_only=True)
class GridArguments(PromptArguments):
    """A model, prompts, and a grid of exits and draft lengths."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run."""
    exit_layers: tuple[int, ...] = ()
    """Exits to draft from; none measures autoregressive decoding alone."""
    num_draft_tokens: tuple[int, ...] = (4,)
    """Draft lengths; every exit is tried with every length."""
    draft_vocab: int | None = None
    """Also drafts from this many of the most frequent tokens (lsjax.cli.count_tokens; with an
    identity tail the tokens of the model's own output are counted)."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability."""
    identity_tail: int | None = None
    """Lets the layers from this one on add nothing, so that every draft of a later exit is right:
    the machinery without the training."""
    prompt: str | None = None
    """Text to continue; three are built in."""
    prompt_length: int | None = None
    """Cuts or repeats every prompt to this many tokens."""
    new_tokens: int = 64
    """Tokens per prompt; ends of text are ignored."""
    temperature: float = 0.0
    """Of the sampling; 0 is greedy. Every strategy has the same seeds, and its own texts."""
    capacity: int = 0
    """Least slots of the cache, for what an unused part of it costs."""
    separate_programs: bool = False
    """Compiles a program for each exit and length instead of one for all."""
    stack_layers: bool = False
    """Runs the layers in a loop, as decode.py --stack-layers does."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""


class Grid:
    """What `GridArguments` ask for; what can be checked without the weights is checked at once.

    warn: is told of rows that are skipped. Raises ConfigError for bad input.
    """

    def __init__(self, arguments: GridArguments, warn: Callable[[str], None]):
        self.arguments = arguments
        new_tokens, tail = arguments.new_tokens, arguments.identity_tail
        check(new_tokens >= 2, f"--new-tokens {new_tokens} is below 2: choose 2 up")
        self.sampling = Sampling(temperature=arguments.temperature)
        self.source = open_checkpoint(arguments.model)
        self.config = self.source.config
        self.tokenizer = load_tokenizer(arguments.model).fitted(self.config.vocab_size)
        length = arguments.prompt_length
        context = self.config.max_context
        check(
            length is None or 1 <= length < context,
            f"--prompt-length {length} is not in 1..{context - 1}: choose a length there, within "
            "the model's context",
        )
        check(arguments.capacity >= 0, f"--capacity {arguments.capacity} is below 0: choose 0 up")
        for name in ("draft_vocab", "draft_confidence"):
            check(
                bool(arguments.exit_layers) or getattr(arguments, name) is None,
                f"--{name.replace('_', '-')} needs --exit-layers: name exits to draft from",
            )
        self.prompts = self._prompts(warn)
        check(
            tail is None or 1 <= tail < self.config.num_layers,
            f"--identity-tail {tail} is not in 1..{self.config.num_layers - 1}: choose a layer "
            "there",
        )
        check(
            bool(arguments.num_draft_tokens) or not arguments.exit_layers,
            "--exit-layers needs --num-draft-tokens, one draft length or several",
        )
        plain = self._cells(None)
        for strategy in [Autoregressive(), *plain]:
            check_settings(self.config, strategy, batch_size=1, max_length=None)
        self._draft_vocab = arguments.draft_vocab if plain else None
        self._counts: dict[int, int] = {}
        if self._draft_vocab is not None:
            if tail is None:
                self._counts = find_counts(arguments.model, cache_directory(), self.tokenizer)
            self._most_frequent(self._counts).validate(self.config)
        self.vocabulary: DraftVocabulary | None = None
        self.dtype = ""

    def load(self) -> Engine:
        """An engine with the model."""
        arguments = self.arguments
        self.dtype = choose_dtype(arguments.dtype)
        model = assemble(self.source, dtype=self.dtype)
        if arguments.identity_tail is not None:
            model = identity_tail(model, arguments.identity_tail)
        if arguments.stack_layers:
            model = stacked(model)
        return Engine(model, self.tokenizer, ignore_end=True, min_capacity=arguments.capacity)

    def strategies(self, engine: Engine) -> list[Strategy]:
        """Autoregressive decoding, then each cell of the grid, with the full head first."""
        if self._draft_vocab is not None:
            counts = self._counts
            if self.arguments.identity_tail is not None:
                counts = self._own_tokens(engine)
            self.vocabulary = self._most_frequent(counts)
        small = self._cells(self.vocabulary) if self.vocabulary else ()
        return [Autoregressive(), *self._cells(None), *small]

    def costs(self, engine: Engine) -> Costs | None:
        """What the parts of a round cost now, beside what they are compared with."""
        if not self.arguments.exit_layers:
            return None
        sizes = [self.config.vocab_size, *([self._draft_vocab] if self._draft_vocab else [])]
        lengths = [length for length in self.lengths if length > 0]
        return calibrated(cache_directory(), machine(), engine.model, lengths, sizes, again=True)

    @property
    def lengths(self) -> list[int]:
        """Draft lengths that rounds are verified for."""
        return sorted({length for cell in self._cells(None) for length in cell.lengths})

    @property
    def title(self) -> str:
        """The model, its type and the prompts."""
        arguments, lengths = self.arguments, [len(prompt) for prompt in self.prompts]
        what = f"{arguments.model.name}, {self.dtype}, {len(lengths)} prompts of {min(lengths)} to "
        what += f"{max(lengths)} tokens, {arguments.new_tokens} new ones"
        if arguments.temperature:
            what += f", temperature {arguments.temperature:g}"
        if arguments.draft_confidence is not None:
            what += f", drafts at {arguments.draft_confidence:g} or more"
        if arguments.identity_tail is not None:
            what += f"; identity tail from layer {arguments.identity_tail} on"
        return what

    def _prompts(self, warn: Callable[[str], None]) -> list[list[int]]:
        arguments, length = self.arguments, self.arguments.prompt_length
        limits = dict(max_new_tokens=arguments.new_tokens, max_length=None)

        def encode(text: str) -> list[int]:
            ids = self.tokenizer.encode(text)
            if ids and length is not None:
                begin = ids[:1] if ids[0] == self.tokenizer.bos_id else []
                text_ids = ids[len(begin) :] or ids
                ids = (begin + text_ids * (length // len(text_ids) + 1))[:length]
            return encode_prompt(ids, self.tokenizer, self.config, **limits)

        check(
            arguments.prompt is None or arguments.prompt_file is None,
            "give one of --prompt and --prompt-file and not both",
        )
        built_in = PROMPTS
        if arguments.prompt is not None:
            built_in = read_prompts(arguments.prompt, None)
        return read_encoded(arguments, built_in, encode, warn)

    def _cells(self, vocabulary: DraftVocabulary | None) -> list[SelfSpeculative]:
        """Every exit with every length, in one program unless told otherwise."""
        arguments = self.arguments
        exits, lengths = sorted({*arguments.exit_layers}), sorted({*arguments.num_draft_tokens})
        cell = partial(
            SelfSpeculative, vocabulary=vocabulary, draft_confidence=arguments.draft_confidence
        )
        cells = [cell(exit_layer, drafts) for exit_layer in exits for drafts in lengths]
        return cells if arguments.separate_programs else in_one_program(cells)

    def _most_frequent(self, counts: dict[int, int]) -> DraftVocabulary:
        return DraftVocabulary.most_frequent(counts, self._draft_vocab, self.config.vocab_size)

    def _own_tokens(self, engine: Engine) -> dict[int, int]:
        """How often the model says each token, by decoding the prompts."""
        counts: dict[int, int] = {}
        limits = dict(max_new_tokens=self.arguments.new_tokens, sampling=self.sampling)
        for completion in engine.generate(self.prompts, **limits):
            for token in completion.token_ids:
                counts[token] = counts.get(token, 0) + 1
        return counts


def wide_console() -> Console:
    """A console with room for a table of figures, also where it is a file."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    return console


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """The rows as a table; the best speedup is green."""
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    names = ["", "E", "d", "N", "tokens/s", "from", "to", "speedup", "accepted", "tokens/round"]
    for name in (*names, "ideal", "share", "predicted", "off by", "round/parts"):
        table.add_column(name, justify="right" if name else "left")
    best = max(row.speedup for row in rows)
    for row in rows:
        off = None if row.predicted is None else row.predicted / row.speedup - 1
        cells = [
            row.strategy.replace("_", " "),
            *(
                "-" if value is None else str(value)
                for value in (row.exit_layer, row.num_draft_tokens, row.draft_vocab)
            ),
            *(f"{x:.1f}" for x in (row.tokens_per_second, row.slowest, row.fastest)),
            f"{row.speedup:.2f}x",
            *(_or_dash(row.acceptance_rate, ".3f"), _or_dash(row.tokens_per_round, ".2f")),
            *(_or_dash(row.ideal, ".2f"), _or_dash(row.share_of_ideal, ".2f")),
            *(_or_dash(row.predicted, ".2f"), _or_dash(off, "+.0%")),
            _or_dash(row.round_over_parts, ".2f"),
        ]
        table.add_row(*cells, style="bold green" if row.speedup == best > 1 else None)
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
