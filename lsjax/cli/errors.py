"""What a program does with an error that is the input's fault."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lsjax.config import ConfigError, check


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

    Bad input is an OSError or a ValueError of this package's own (ConfigError, CheckpointError,
    TokenizerError and their like). Anything else is a bug, and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        ours = type(error).__module__.partition(".")[0] == "lsjax"
        if not ours and not isinstance(error, OSError):
            raise
        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        console.print("error: ", style="bold red", end="")
        console.print(" ".join(str(error).split()), markup=False)
        sys.exit(2)
