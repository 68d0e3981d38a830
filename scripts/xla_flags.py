"""Flags of XLA that the installed version knows. XLA ends a process at an unknown flag."""

import os
import subprocess
import sys
from collections.abc import Sequence


def known_flags(flags: Sequence[str]) -> str:
    """The flags that XLA accepts, separated by spaces, for XLA_FLAGS. A child process tries them.

    Raises RuntimeError if jax does not start for another reason.
    """
    errors = _start_jax(flags)
    if not errors:
        return " ".join(flags)
    known = [flag for flag in flags if flag not in errors]
    if len(known) == len(flags):
        raise RuntimeError(f"jax does not start: {errors.strip().splitlines()[-1]}")
    return " ".join(known)


def _start_jax(flags: Sequence[str]) -> str:
    """Starts jax with these flags in a child process; returns its errors, or nothing if it runs."""
    child = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
        stderr=subprocess.PIPE,
        text=True,
    )
    return "" if child.returncode == 0 else child.stderr or f"exit code {child.returncode}"
