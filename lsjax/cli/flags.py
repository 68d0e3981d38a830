"""Flags that programs share, and what is made of them.

A program's arguments are a dataclass that inherits `ModelFlags` and `StrategyFlags`, and has
`sampling: SamplingFlags = GREEDY`. All flags are flat: --model, --exit-layer, --temperature.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import (
    RunSource,
    TensorSource,
    load,
    open_checkpoint,
    read_generation_defaults,
)
from lsjax.cli.setup import cache_directory, choose_dtype, keep_compiled_programs
from lsjax.config import Checked, ConfigError, LlamaConfig, MeshConfig, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.vocabulary import find_counts
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.engine import Engine, check_settings
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.model.llama import Llama
from lsjax.sharding import make_mesh

T = TypeVar("T")
Source = TensorSource | RunSource
StrategyName = Literal["autoregressive", "early_exit", "self_speculative"]
# `Sampling` itself, without a prefix on the command line.
SamplingFlags = tyro.conf.OmitArgPrefixes[Sampling]


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Checked, prefix="--"):
    """A model and how it runs."""

    model: Path
    """Hugging Face directory (config.json, safetensors, tokenizer), .gguf file, or directory of a
    training run (RUN@200 and RUN@best are steps of it)."""
    batch_size: int = 1
    """Prompts decoded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    max_length: int | None = None
    """Most tokens of prompt and new text together; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to decode on; one by default."""


@dataclass(frozen=True, kw_only=True)
class StrategyFlags(Checked, prefix="--"):
    """Strategies: each name with each exit, and self-speculation with each draft length too."""

    strategies: Annotated[tuple[StrategyName, ...], tyro.conf.arg(aliases=("--strategy",))] = (
        "autoregressive",
    )
    """autoregressive runs all layers for each token. early_exit runs the first layers only.
    self_speculative drafts with the first layers and verifies with the others: the same tokens as
    autoregressive."""
    exit_layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--exit-layer",))] = ()
    """Layers that draft, or that early_exit runs. Self-speculation takes it from the model's
    generation_config.json (assistant_early_exit) if that has it."""
    num_draft_tokens: tuple[int, ...] = ()
    """Tokens drafted in a round (from num_assistant_tokens of the model, if it has that)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only: a cheaper head, the same text.
    python -m lsjax.cli.count_tokens counts them."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability: fewer
    rejected drafts, the same text."""


def make_strategies(
    flags: StrategyFlags,
    model: Path,
    tokenizer: Tokenizer,
    counts: Mapping[int, int] | None = None,
) -> list[Strategy]:
    """Each strategy that the flags name, with each exit and draft length.

    Self-speculation may leave exit and draft length to the model's directory. counts: how frequent
    each token is, for the draft vocabulary; by default those kept for this model.

    Raises ConfigError for a number that is missing, or that no strategy uses.
    """
    names, exits = list(dict.fromkeys(flags.strategies)), list(dict.fromkeys(flags.exit_layers))
    check(bool(names), "--strategies is empty: name one or more")
    check(
        not exits or names != ["autoregressive"],
        "--exit-layer means nothing to autoregressive decoding: choose another --strategy",
    )
    check(bool(exits) or "early_exit" not in names, "early_exit needs --exit-layer")
    for name in ("num_draft_tokens", "draft_vocab", "draft_confidence"):
        check(
            getattr(flags, name) in (None, ()) or "self_speculative" in names,
            f"--{name.replace('_', '-')} means nothing to {' and '.join(names)}: add --strategy "
            "self_speculative",
        )
    strategies: list[Strategy] = []
    for name in names:
        match name:
            case "autoregressive":
                strategies.append(Autoregressive())
            case "early_exit":
                strategies += map(EarlyExit, exits)
            case "self_speculative":
                strategies += _self_speculative(flags, exits, model, tokenizer, counts)
    return strategies


def make_strategy(flags: StrategyFlags, model: Path, tokenizer: Tokenizer) -> Strategy:
    """The only strategy that the flags name. Raises ConfigError if there are several."""
    strategies = make_strategies(flags, model, tokenizer)
    check(
        len(strategies) == 1,
        "several strategies, exit layers or draft lengths are given: this program takes one of "
        "--strategy, --exit-layer and --num-draft-tokens",
    )
    return strategies[0]


def _self_speculative(
    flags: StrategyFlags,
    exits: Sequence[int],
    model: Path,
    tokenizer: Tokenizer,
    counts: Mapping[int, int] | None,
) -> list[SelfSpeculative]:
    lengths = list(dict.fromkeys(flags.num_draft_tokens))
    if not exits or not lengths:
        defaults = read_generation_defaults(model)
        exits = exits or ([defaults.exit_layer] if defaults.exit_layer is not None else [])
        drafts = defaults.num_draft_tokens
        lengths = lengths or ([drafts] if drafts is not None else [])
    check(
        bool(exits) and bool(lengths),
        f"self_speculative needs --exit-layer and --num-draft-tokens: {model} does not say them",
    )
    vocabulary = None
    if flags.draft_vocab is not None:
        if counts is None:
            counts = find_counts(model, cache_directory(), tokenizer)
        vocabulary = DraftVocabulary.most_frequent(counts, flags.draft_vocab, tokenizer.vocab_size)
    confidence = flags.draft_confidence
    return [
        SelfSpeculative(exit_layer, drafts, vocabulary, draft_confidence=confidence)
        for exit_layer in exits
        for drafts in lengths
    ]


def check_sampling(
    sampling: Sampling,
    num_samples: int,
    *,
    is_greedy: bool | None = None,
    unused: Sequence[str] = ("top_k", "top_p", "min_p"),
) -> None:
    """Raises ConfigError where decoding is greedy and a flag asks for what only sampling uses.

    is_greedy: whether all texts are; by default whether `sampling` is. unused: names of the fields
    that greedy decoding ignores.
    """
    check(num_samples >= 1, f"--num-samples {num_samples} is below 1: choose 1 or more")
    if not (sampling.temperature == 0 if is_greedy is None else is_greedy):
        return
    given = [name for name in unused if getattr(sampling, name) != getattr(GREEDY, name)]
    for name in (*given, *["num_samples"] * (num_samples > 1)):
        raise ConfigError(
            f"--{name.replace('_', '-')} means nothing to greedy decoding: choose a --temperature "
            "above 0"
        )


def open_model(flags: ModelFlags) -> tuple[Source, Tokenizer]:
    """The checkpoint, without its weights, and its tokenizer.

    Raises CheckpointError or TokenizerError for damaged files.
    """
    source = open_checkpoint(flags.model)
    return source, load_tokenizer(flags.model).fitted(source.config.vocab_size)


def chosen_mesh(flags: ModelFlags) -> Mesh | None:
    """The mesh that the flags ask for; None for one device. Raises ConfigError if the devices
    don't suffice."""
    return None if flags.mesh == MeshConfig() else make_mesh(flags.mesh)


def check_engine(
    flags: ModelFlags, config: LlamaConfig, strategies: Sequence[Strategy], mesh: Mesh | None
) -> None:
    """Raises ConfigError where a strategy, batch size or length fits neither model nor mesh."""
    for strategy in strategies:
        check_settings(
            config,
            strategy,
            batch_size=flags.batch_size,
            max_length=flags.max_length,
            data_axis=1 if mesh is None else mesh.shape["data"],
        )


def load_engine(
    flags: ModelFlags,
    source: Source,
    tokenizer: Tokenizer,
    notes: Console,
    *,
    strategy: Strategy | None = None,
    mesh: Mesh | None = None,
    change: Callable[[Llama], Llama] = lambda model: model,
    **options: Any,
) -> Engine:
    """An engine with the checkpoint's weights, read with a bar where `notes` is a terminal.

    change: what is done to the model first. options: other arguments of `Engine`.
    """
    keep_compiled_programs()
    dtype = choose_dtype(flags.dtype)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        model = load(
            source,
            dtype=dtype,
            track=lambda parts: progress.track(parts, description="loading"),
            mesh=mesh,
        )
    return Engine(
        change(model),
        tokenizer,
        strategy,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
        mesh=mesh,
        **options,
    )


def parse_flags(kind: type[T], argv: Sequence[str] | None, description: str, **settings: Any) -> T:
    """`tyro.cli`: the fields of the dataclass `kind` as flags.

    Raises ConfigError with one line for an unknown flag, for a value of another type, and for
    values that the dataclasses reject.
    """
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(kind, args=argv, description=description, **settings)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        own = (error for error in _causes(end) if isinstance(error, ConfigError))
        raise next(own, ConfigError(_in_a_line(shown.getvalue()))) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _in_a_line(box: str) -> str:
    """The text of tyro's box without its title, drawn or in ASCII, coloured or not."""
    _title, *lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines() or [""]
    sections = [""]
    for line in lines:
        row = line.strip(" │╰╯")
        if row.strip("─-"):
            sections[-1] += f" {row}"
        else:
            sections.append("")  # after a rule
    said = [
        " ".join(part.split()).removesuffix(".")
        for part in sections
        if part and "full helptext" not in part
    ]
    return "; ".join((*said, "--help lists all flags"))
