"""Setup that all programs share: compilation cache, precision, memory, and errors."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lsjax.config import ConfigError, Path, check, in_bucket
from lsjax.data.files import cache_directory, one_line, write_whole
from lsjax.sharding import machine

# Packages that reach buckets. Their errors tell of the network, of the bucket, or of its rights.
BUCKETS = ("gcsfs", "google", "aiohttp", "requests")


def keep_compiled_programs() -> None:
    """Caches compiled programs on disk, so that a second run starts at once. Each kind of machine
    has its own cache, as machines may share a home. JAX_COMPILATION_CACHE_DIR takes precedence."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla" / machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def exact_products() -> None:
    """Sets matmuls to full float32. Accelerators use fewer bits by default."""
    jax.config.update("jax_default_matmul_precision", "highest")


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks. Otherwise training steps on CPUs spend time on page
    faults (docs/training.md). Does nothing with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD ... of malloc.h
    mallopt(mmap_max, 0)  # no separate mapping for a large request
    mallopt(trim_threshold, -1)  # no memory returned to the system
    mallopt(arena_max, 1)  # one pool for all threads


def choose_dtype(dtype: str) -> str:
    """Resolves `auto`: float32 on CPUs, bfloat16 on accelerators. float32 sets exact matmuls."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype == "float32":
        exact_products()
    return dtype


def check_output(file: Path, prompts: Path | None = None) -> None:
    """Checks a file before the work starts. Raises ConfigError if it can't be written, or if it is
    the file of prompts."""
    check(
        prompts is None or file.resolve() != prompts.resolve(),
        f"{file} would overwrite the prompts: name another file",
    )
    try:
        if not in_bucket(file):
            file.open("a").close()
        elif not file.exists():
            write_whole(file, b"")
    except OSError as error:
        raise ConfigError(
            f"{file} can't be written ({error.strerror or one_line(error)}): name a file in a "
            "directory or bucket that exists and is writable"
        ) from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception with exit code 143, so that finished work is written."""

    def leave(number, frame):
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set from Python


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input into one line on stderr and exit code 2, and Ctrl-C into exit code 130.

    Bad input is an OSError, an error that this package defines, or an error of a bucket. Other
    errors are bugs and keep their tracebacks.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in ("lsjax", *BUCKETS):
            raise
        from rich.console import Console  # scripts/accelerator.py runs without rich

        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        console.print("error: ", style="bold red", end="")
        console.print(" ".join(str(error).split()), markup=False)
        sys.exit(2)
