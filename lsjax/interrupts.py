"""Ctrl-C and SIGTERM: how a program ends, whatever it is doing.

    importing, or exiting     the handler ends the process
    in Python code of `main`  the handler raises an exception, so that with-blocks close their files
    in native code of `main`  a thread ends the process, as Python runs no handler there
    at a second signal        the process ends at once

One line on stderr says so, and the exit code is 128 + the signal's number. The interpreter is not
finalized: that would crash while XLA compiles. This module imports only what loads fast, because
`run_program` comes before all other imports of a program.
"""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 5.0  # seconds after which a signal ends native code
POLL = 0.1  # seconds between looks; `timeout` sends a signal twice, which counts once


class Program:
    """How signals end this process. Without `run` they end it in Python's own way."""

    def __init__(self):
        self.kept = ""  # what remains after an interrupt, for the line on stderr
        self.finish: Callable[[], None] = lambda: None  # writes what is done
        self.raises = False  # whether `main` runs, so that an exception ends the program
        self._number: int | None = None  # of the signal that raised an exception
        self._said = threading.Lock()
        self._untaken: socket.socket | None = None  # a byte for each signal without a handler yet
        self._taken = False  # whether a handler had a signal

    def run(self, name: str) -> NoReturn:
        """Runs the `main` of a module, and exits with its code."""
        self._catch()
        main, code = import_module(name).main, 0
        try:
            self.raises = True
            code = main()
        except BaseException:
            if self._number is None:
                raise
        finally:
            self.raises = False
        if self._number is not None:
            self._leave(self._number)
        sys.exit(code)

    def take(self) -> None:
        """Marks all signals so far as handled. Every handler calls it first."""
        if self._untaken is not None:
            with suppress(BlockingIOError):
                self._untaken.recv(64, socket.MSG_DONTWAIT)
            self._taken = True

    def _catch(self) -> None:
        """Installs the handlers. An ignored signal stays ignored, as after `nohup`."""
        self._untaken, written = socket.socketpair()
        written.setblocking(False)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()
        sys.unraisablehook = self._unraisable
        atexit.register(ignore_signals)  # runs last: after it, signals would kill the process

    def _handle(self, number: int, frame: Any) -> None:
        self.take()
        if self._number is not None or not self.raises:
            self._end(number)
        self._number = number
        self._say()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _watch(self) -> None:
        """Ends the process if a signal waits too long for `_handle`, or if it is not the first one.
        Other handlers, such as that of `noted`, may come as late as they like."""
        while True:
            self._waiting()
            time.sleep(POLL)
            first, end = self._waiting(socket.MSG_DONTWAIT), time.monotonic() + PATIENCE
            while found := self._waiting(socket.MSG_DONTWAIT):
                ours = signal.getsignal(found[0]) == self._handle
                again = len(found) > len(first) or (ours and self._taken)
                if again or (ours and time.monotonic() > end):
                    self._end(found[-1])
                time.sleep(POLL)

    def _waiting(self, flags: int = 0) -> bytes:
        """Numbers of the signals without a handler yet. Waits for one, unless `flags` forbid."""
        with suppress(BlockingIOError):
            found = self._untaken.recv(64, socket.MSG_PEEK | flags)
            return bytes(number for number in found if number in SIGNALS)
        return b""

    def _unraisable(self, found: Any) -> None:
        """Ends the process if `_handle` ran in a callback, whose exceptions only get printed."""
        if self._number is None or not issubclass(found.exc_type, KeyboardInterrupt | SystemExit):
            return sys.__unraisablehook__(found)
        self._leave(self._number)

    def _end(self, number: int) -> NoReturn:
        self._say()
        self._leave(number)

    def _say(self) -> None:
        """Prints the line, once. Not by `print`, which the signal may have interrupted."""
        if self._said.acquire(blocking=False):
            line = f"interrupted: {self.kept}\n" if self.kept else "interrupted\n"
            with suppress(OSError):
                os.write(2, ("\r\x1b[K" * os.isatty(2) + line).encode())

    def _leave(self, number: int) -> NoReturn:
        """Ends the process without finalizing the interpreter. Shows a hidden cursor."""
        for write in (self.finish, sys.stdout.flush, sys.stderr.flush):
            with suppress(Exception):  # such as a closed pipe
                write()
        for terminal in filter(os.isatty, (1, 2)):
            with suppress(OSError):
                os.write(terminal, b"\x1b[?25h")
        os._exit(128 + number)


_program = Program()
run_program = _program.run


def command(*before: str) -> NoReturn:
    """Runs the command `lsjax`. before: arguments in front of those of the command line."""
    sys.argv[1:1] = before
    run_program("lsjax.cli.main")


@contextmanager
def importing() -> Iterator[None]:
    """Signals end the process in the block, which imports: an exception would be shown there."""
    before, _program.raises = _program.raises, False
    try:
        yield
    finally:
        _program.raises = before


def keeps(what: str, finish: Callable[[], None] = lambda: None) -> None:
    """Says what remains if the program is interrupted from now on. `finish` writes the rest of it,
    in another thread if the main one runs native code."""
    _program.kept, _program.finish = what, finish


def ignore_signals() -> None:
    """Ignores the signals from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noted(*numbers: int, then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Only notes the first signal of each number in the yielded list, and calls `then`. A second
    one has the handler from outside the block."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        _program.take()
        signal.signal(number, before[number])
        received.append(number)
        then()

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raised() -> Iterator[None]:
    """Each Ctrl-C raises KeyboardInterrupt in the block, which catches it and goes on."""

    def interrupt(number: int, frame: Any) -> None:
        _program.take()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
