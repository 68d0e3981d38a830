"""Runs a program that a model wrote, with limits. They guard against accidents and are not a
security boundary: run programs that may be hostile on a separate machine.

    time                        a deadline here, and RLIMIT_CPU
    memory, output              RLIMIT_AS, RLIMIT_FSIZE
    processes, files, sockets   an audit hook in the program's interpreter (guard.py)
    network                     separate namespaces, if unshare works
    success                     a random token, which only a completed program sends back

The program gets an empty environment and only the standard library. When it ends, its process
group is killed.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from lsjax.config import check
from lsjax.evaluation.guard import TOKEN_BYTES

GUARD = Path(__file__).with_name("guard.py")
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid")
UNSHARE += ("--fork", "--kill-child", "--mount-proc")


def run_program(source: str, *, seconds: float = 10.0) -> str | None:
    """Runs Python source in a separate interpreter. Returns why it did not run to its end, or None.

    seconds: limit of wall-clock time. Raises ConfigError on systems other than Linux.
    """
    check(
        sys.platform == "linux",
        f"programs run only on Linux, whose limits they need, not on {sys.platform}: leave out "
        "--allow-code-execution",
    )
    token, (ours, theirs) = secrets.token_bytes(TOKEN_BYTES), socket.socketpair()
    with ours, theirs, tempfile.TemporaryDirectory(prefix="lsjax-program-") as folder:
        program, printed = Path(folder, "program.py"), Path(folder, "printed.txt")
        program.write_text(source, encoding="utf-8", errors="replace")
        interpreter = (sys.executable, "-I", "-S", "-B", str(GUARD))
        command = [*isolation(), *interpreter, str(program), str(seconds)]
        ours.sendall(token)
        ours.shutdown(socket.SHUT_WR)  # whatever the program reads is empty
        with printed.open("wb") as stream:
            code = _run(command, folder, theirs, stream, seconds)
        lines = printed.read_bytes()[-400:].decode(errors="replace").strip().splitlines()
        if code is None:
            return f"took longer than {seconds:g} s"
        if _received(ours) == token:
            return None
    return lines[-1] if lines else f"ended early with exit code {code}"


def _received(stream: socket.socket) -> bytes:
    """What the program sent, up to one byte more than a token."""
    try:
        return stream.recv(TOKEN_BYTES + 1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


@lru_cache
def isolation() -> tuple[str, ...]:
    """Prefix of a command that runs it in separate namespaces; empty if that does not work."""
    name, *options = UNSHARE
    prefix = (shutil.which(name) or name, *options)  # programs have no PATH
    try:
        subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return prefix


def _run(
    command: list[str],
    folder: str,
    stdin: socket.socket | int,
    stdout: BinaryIO,
    seconds: float,
) -> int | None:
    """The exit code; None if the program was stopped at the deadline."""
    streams = dict(stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT)
    started = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)
    try:
        return started.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # the group has ended
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
