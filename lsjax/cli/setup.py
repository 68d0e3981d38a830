"""Setup that all programs share: flags, errors, compilation cache, precision and memory."""

import ctypes
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console
from rich.progress import track

from lsjax.config import AnyPath, ConfigError, as_path, check, in_bucket
from lsjax.io.files import cache_directory, one_line
from lsjax.sharding import machine
from lsjax.terminal import SafeConsole, shown_warnings, written_output

T = TypeVar("T")
PATHS = tyro.constructors.ConstructorRegistry()
# Packages that reach buckets. Their errors tell of the network, of the bucket, or of its rights.
BUCKETS = ("gcsfs", "google", "aiohttp", "requests")
LARGEST_KEPT = 1 << 28  # bytes of a block that glibc keeps when it is freed


def parse_flags(kind: type[T], argv: Sequence[str] | None, description: str, **settings: Any) -> T:
    """Parses flags into the dataclass `kind` with `tyro.cli`. Raises ConfigError with one line for
    an unknown flag, a value of the wrong type, or a value that the dataclass rejects."""
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


def program(
    kind: type[T], work: Callable[[T], int | None], description: str, parse: Callable = parse_flags
) -> Callable[[Sequence[str] | None], int]:
    """A `main` that parses flags, runs `work` and returns its code or 0. Bad input exits with 2."""

    def main(argv: Sequence[str] | None = None) -> int:
        with one_line_errors():
            return work(parse(kind, argv, description)) or 0

    return main


@PATHS.primitive_rule
def _path_flag(info: Any) -> Any:
    """Tells tyro how to read and show a path, which may be in a bucket. An empty text stays a text,
    which the dataclass refuses with the flag's name."""
    if info.type not in (AnyPath, AnyPath | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_path(words[0]) if words[0] else "",
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda path: [str(path)],
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input into one line on stderr and exit code 2, and Ctrl-C into exit code 130. Bad
    input is an OSError, or an error of this package or of a bucket. Bugs keep their traceback.

    If the reader of the output is gone, the program ends without a word, with exit code 141."""
    try:
        with shown_warnings(), written_output():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in ("lsjax", *BUCKETS):
            raise
        console = SafeConsole(stderr=True, soft_wrap=True)
        console.print("error: ", style="bold red", end="")
        console.print(" ".join(str(error).split()))
        sys.exit(2)


def check_output(file: AnyPath, prompts: AnyPath | None = None) -> None:
    """Raises ConfigError if a file can't be written, or if it is the file of prompts."""
    check(
        prompts is None or file.resolve() != prompts.resolve(),
        f"{file} would overwrite the prompts: name another file",
    )
    try:
        if not in_bucket(file):
            file.open("a").close()
        elif not file.exists():
            file.write_bytes(b"")
    except OSError as error:
        raise ConfigError(
            f"{file} can't be written ({error.strerror or one_line(error)}): name a file in a "
            "directory or bucket that exists and is writable"
        ) from None


def bar(console: Console, description: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Passes a sequence on, and shows a progress bar if the console is a terminal."""
    options = dict(console=console, transient=True, disable=not console.is_terminal)
    # Without a thread: after an error the interpreter may wait for it at its end, without end.
    return partial(track, description=description, auto_refresh=False, **options)


def keep_compiled_programs() -> None:
    """Caches compiled programs on disk, so that a second run starts at once. Each kind of machine
    has its own cache, as machines may share a home. JAX_COMPILATION_CACHE_DIR takes precedence."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla" / machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def exact_products() -> None:
    """Sets matmuls to full float32. Accelerators use fewer bits by default."""
    jax.config.update("jax_default_matmul_precision", "highest")


def choose_dtype(dtype: str) -> str:
    """Resolves `auto`: float32 on CPUs, bfloat16 on accelerators. float32 sets exact matmuls."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype == "float32":
        exact_products()
    return dtype


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks below `LARGEST_KEPT`. Otherwise training steps on CPUs spend
    time on page faults. Larger blocks are returned to the system, because glibc would not reuse
    them (docs/training.md). Does nothing with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    # M_TRIM_THRESHOLD ... of malloc.h
    trim_threshold, mmap_threshold, mmap_max, arena_max = -1, -3, -4, -8
    if not mallopt(mmap_threshold, LARGEST_KEPT):
        mallopt(mmap_max, 0)  # older versions refuse the threshold: they keep all blocks
    mallopt(trim_threshold, -1)  # no kept memory returned to the system
    mallopt(arena_max, 1)  # one pool for all threads
