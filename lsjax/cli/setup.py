"""What every program does around its work: compiled programs, precision, memory, and errors."""

import ctypes
import hashlib
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lsjax.config import ConfigError, check
from lsjax.data.files import cache_directory


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once: those of each kind of
    machine apart, as home directories travel. JAX_COMPILATION_CACHE_DIR, if set, holds."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla" / machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def exact_products() -> None:
    """Matrix products in full float32: accelerators use fewer bits unless told."""
    jax.config.update("jax_default_matmul_precision", "highest")


def keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks: a page of a training step's memory that the system hands
    out anew costs a fault on CPUs (docs/training.md). Does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD ... of malloc.h
    mallopt(mmap_max, 0)  # no block of its own for a large request,
    mallopt(trim_threshold, -1)  # nothing handed back,
    mallopt(arena_max, 1)  # and one pool for all threads


def choose_dtype(dtype: str) -> str:
    """`auto` is float32 on CPUs and bfloat16 on accelerators; float32 gets exact products."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype == "float32":
        exact_products()
    return dtype


def machine() -> str:
    """A name for this kind of processor and the cores that we may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name {platform.platform()} {platform.processor()}"]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256("\n".join([*kind, str(cores)]).encode()).hexdigest()[:12]


def check_output(file: Path, prompts: Path | None = None) -> None:
    """Raises ConfigError where a file can't be written: better now than after the work; and where
    it is that of the prompts."""
    check(
        prompts is None or file.resolve() != prompts.resolve(),
        f"{file} would overwrite the prompts: name another file",
    )
    try:
        file.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{file} can't be written ({error.strerror}): name a file in a directory that exists "
            "and is yours"
        ) from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves by the way of an exception, exit code 143: what is done is written."""

    def leave(number, frame):
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: it was not Python's


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input into one line on stderr and exit code 2, Ctrl-C into a quiet 130.

    Bad input is an OSError or a ValueError of this package's own. Anything else is a bug, and keeps
    its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        ours = type(error).__module__.partition(".")[0] == "lsjax"
        if not ours and not isinstance(error, OSError):
            raise
        from rich.console import Console  # a bare machine measures without rich

        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        console.print("error: ", style="bold red", end="")
        console.print(" ".join(str(error).split()), markup=False)
        sys.exit(2)
