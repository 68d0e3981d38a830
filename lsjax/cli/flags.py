"""Shared command-line flags, and the objects built from them.

A program's arguments are a dataclass that inherits `ModelFlags` and `StrategyFlags`, and has
`sampling: SamplingFlags = GREEDY`. All flags are flat: --model, --exit-layer, --temperature.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.run import RunSource
from lsjax.checkpoints.tensors import TensorSource
from lsjax.cli.setup import choose_dtype, keep_compiled_programs, one_line_errors
from lsjax.config import Checked, ConfigError, MeshConfig, Path, as_path, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.strategy import Strategy
from lsjax.model.llama import Llama
from lsjax.sharding import make_mesh

T = TypeVar("T")
PATHS = tyro.constructors.ConstructorRegistry()
# `Sampling` itself, without a prefix on the command line.
SamplingFlags = tyro.conf.OmitArgPrefixes[Sampling]


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Checked, prefix="--"):
    """Model, devices and dtype."""

    model: Path
    """Hugging Face directory (config.json, safetensors, tokenizer), .gguf file, or directory of a
    training run (RUN@200 and RUN@best are steps of it)."""
    batch_size: int = 1
    """Prompts decoded in parallel."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    max_length: int | None = None
    """Maximum tokens, prompt plus new text; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to decode on; one by default."""


@dataclass(frozen=True, kw_only=True)
class ChatFlags(Checked, prefix="--"):
    """Prompts as chat messages."""

    chat: bool = False
    """Formats prompts with the model's chat template."""
    system: str | None = None
    """System message, with --chat."""

    def __post_init__(self):
        super().__post_init__()
        check(self.chat or self.system is None, "--system needs --chat: add it, or drop --system")


class OpenModel(NamedTuple):
    """A checkpoint's metadata, its tokenizer and the requested mesh; weights are not loaded."""

    flags: ModelFlags
    source: TensorSource | RunSource
    tokenizer: Tokenizer
    mesh: Mesh | None


def open_model(flags: ModelFlags) -> OpenModel:
    """Opens a checkpoint and its tokenizer. Raises CheckpointError or TokenizerError for damaged
    files, and ConfigError if the mesh does not fit."""
    flags.mesh.check_decoding()
    source = open_checkpoint(flags.model)
    tokenizer = load_tokenizer(flags.model).fitted(source.config.vocab_size)
    mesh = None if flags.mesh == MeshConfig() else make_mesh(flags.mesh)
    return OpenModel(flags, source, tokenizer, mesh)


def check_sampling(sampling: Sampling, num_samples: int, *, is_greedy: bool | None = None) -> None:
    """Raises ConfigError if decoding is greedy and a flag affects only sampling.

    is_greedy: whether all texts are decoded greedily; by default, whether `sampling` is greedy.
    """
    given = [n for n in ("top_k", "top_p", "min_p") if getattr(sampling, n) != getattr(GREEDY, n)]
    given += ["num_samples"] * (num_samples > 1)
    if given and (sampling.temperature == 0 if is_greedy is None else is_greedy):
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect on greedy decoding: choose a "
            "--temperature above 0"
        )


def load_engine(
    model: OpenModel,
    notes: Console,
    *,
    strategy: Strategy | None = None,
    change: Callable[[Llama], Llama] = lambda model: model,
    **options: Any,
) -> Engine:
    """An engine with the checkpoint's weights, loaded with a progress bar if `notes` is a terminal.

    change: applied to the model after loading. options: other arguments of `Engine`.
    """
    keep_compiled_programs()
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        loaded = load(
            model.source,
            dtype=choose_dtype(model.flags.dtype),
            track=lambda parts: progress.track(parts, description="loading"),
            mesh=model.mesh,
        )

    def timings(sequence: Sequence) -> Iterator:
        with Progress(console=notes, transient=True) as progress:
            yield from progress.track(sequence, description="timing rounds, once for this machine")

    return Engine(
        change(loaded),
        model.tokenizer,
        strategy,
        track=timings,
        batch_size=model.flags.batch_size,
        max_length=model.flags.max_length,
        mesh=model.mesh,
        **options,
    )


def _read_path(words: list[str]) -> Path:
    try:
        return as_path(words[0])
    except ConfigError as error:
        raise SystemExit(2) from error  # `parse_flags` finds the error, which tyro would wrap


@PATHS.primitive_rule
def _path_flag(info: Any) -> Any:
    """Tells tyro how to read and show a path, which may be in a bucket."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_read_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def program(
    kind: type[T], work: Callable[[T], int | None], description: str
) -> Callable[[Sequence[str] | None], int]:
    """Builds a `main` that parses flags, runs `work` and returns its exit code (0 for None).
    Bad input exits with code 2."""

    def main(argv: Sequence[str] | None = None) -> int:
        with one_line_errors():
            return work(parse_flags(kind, argv, description)) or 0

    return main


def parse_flags(kind: type[T], argv: Sequence[str] | None, description: str, **settings: Any) -> T:
    """Parses flags into the dataclass `kind` with `tyro.cli`.

    Raises ConfigError with one line for an unknown flag, a value of the wrong type, or a value that
    the dataclass rejects.
    """
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(kind, args=argv, description=description, registry=PATHS, **settings)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        raise cause or ConfigError(_in_a_line(shown.getvalue())) from None


def _in_a_line(box: str) -> str:
    """The text in tyro's error box on one line, without title, borders and colours."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    rows = [line.strip(" │╰╯") for line in lines]
    sections = " ".join(row if row.strip("─-") else "\n" for row in rows).split("\n")
    said = [" ".join(part.split()).removesuffix(".") for part in sections if part.strip()]
    said = [part for part in said if "full helptext" not in part]
    return "; ".join((*said, "--help lists all flags"))
