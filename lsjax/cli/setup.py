"""Setup that programs share: output files, compilation cache, precision and memory."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from lsjax.config import AnyPath, ConfigError, check, in_bucket
from lsjax.io.files import cache_directory, one_line
from lsjax.sharding import machine

PATIENCE = 2.0  # seconds without a word
LARGEST_KEPT = 1 << 28  # bytes of a block that glibc keeps when it is freed


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


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Says what the user waits for: at once in a terminal, where the line vanishes at the end, and
    elsewhere only if it takes a while."""
    if console.is_terminal:
        with console.status(what):
            yield
        return
    line = threading.Timer(PATIENCE, console.print, [f"{what} ..."])
    line.daemon = True
    line.start()
    try:
        yield
    finally:
        line.cancel()


def keep_compiled_programs() -> None:
    """Caches compiled programs on disk, so that a second run starts at once. Each kind of machine
    has its own cache, as machines may share a home. JAX_COMPILATION_CACHE_DIR takes precedence."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla" / machine()))
    # A bucket takes longer to answer than a small program takes to compile.
    seconds = 0.5 if "://" in jax.config.jax_compilation_cache_dir else 0.0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


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
