"""What every program does before it works: where compiled programs are kept, precision, memory."""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from lsjax.data.token_store import cache_directory


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once.

    JAX_COMPILATION_CACHE_DIR, if set, holds. Programs compiled for one processor are not offered
    to another: home directories travel between machines.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla" / machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def exact_products() -> None:
    """Matrix products in full float32: accelerators use fewer bits unless told."""
    jax.config.update("jax_default_matmul_precision", "highest")


def keep_freed_memory() -> None:
    """Lets the C library keep large freed blocks instead of handing them back to the system.

    On CPUs a training step asks for all of its temporary memory at once and frees it at the end;
    got from the system anew, each of its pages costs a fault (docs/training.md).
    Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
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
