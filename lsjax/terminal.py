"""Consoles for people: a terminal is shown control characters, and a closed pipe ends the program.

The texts of a model, its chat template and the names of files are untrusted. Sent to a terminal,
their escape sequences could move the cursor or write to the clipboard.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment, Segments
from rich.text import Text

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0, DEL and C1 without tab and newline


def visible(text: str) -> str:
    """The text with control characters other than tab and newline spelled out, such as \\x1b."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def verbatim(text: str) -> Segments:
    """Text for `SafeConsole.print`. Rich would expand the tabs of a plain string."""
    return Segments([Segment(text)])


class SafeConsole(Console):
    """A console that changes no text, except that a terminal is shown control characters.

    Rich's markup, emoji and highlighting are off. If the reader of a pipe is gone, the program ends
    as by `end_quietly`.
    """

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Rich's hook for all that is printed."""
        for segment in super().render(renderable, options):
            if self.is_terminal and not segment.control:
                segment = Segment(visible(segment.text), segment.style)
            yield segment

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's hook for strings, whose width a table measures before it renders them."""
        return super().render_str(visible(text) if self.is_terminal else text, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Rich's hook for a closed pipe."""
        end_quietly(self.file)


class _Shown(logging.Handler):
    """Prints the messages of a log on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        SafeConsole(stderr=True, soft_wrap=True).print(self.format(record))


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Prints what this package logs by a SafeConsole, instead of by the handlers that some library
    installs."""
    package, handler = logging.getLogger("lsjax"), _Shown(logging.WARNING)
    package.addHandler(handler)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.propagate = True


def end_quietly(stream: IO[str]) -> NoReturn:
    """Ends the program without a word and with the exit code of SIGPIPE, 141: the reader of its
    output is gone."""
    _discard(stream)
    sys.exit(128 + signal.SIGPIPE)


@contextmanager
def written_output() -> Iterator[None]:
    """Flushes standard output after the block. Ends the program as by `end_quietly` if its reader
    is gone. Raises an OSError that names standard output if that can't be written."""
    stream = sys.stdout
    try:
        try:
            with _named_writes(stream) if stream else nullcontext():
                yield
        finally:
            with _named_errors():
                print(end="", flush=True)  # does nothing without a standard output
    except BrokenPipeError:
        end_quietly(sys.stdout)


@contextmanager
def _named_writes(stream: IO[str]) -> Iterator[None]:
    """A text that is larger than the stream's buffer is written at once, not when it is flushed."""
    write = stream.write

    def named(text: str) -> int:
        with _named_errors():
            return write(text)

    stream.write = named
    try:
        yield
    finally:
        stream.write = write


@contextmanager
def _named_errors() -> Iterator[None]:
    """Errors of writing to standard output get its name."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise OSError(
            f"standard output can't be written ({error.strerror}): free space there, or send it "
            "elsewhere"
        ) from error


def _discard(stream: IO[str]) -> None:
    """Sends what a stream holds back to nowhere. Otherwise the interpreter fails to flush it when
    it ends, and says so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
