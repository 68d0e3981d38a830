"""Runs a program that a model wrote, with limits. A guard against accidents, no security boundary:
run what may be hostile in a machine of its own.

    time                        a deadline here, and RLIMIT_CPU
    memory, output              RLIMIT_AS, RLIMIT_FSIZE
    processes, files, sockets   an audit hook in the program's interpreter
    network                     namespaces of its own, where unshare works

The program gets an empty environment and the standard library alone. When it ends, everything in
its process group is killed. This file is also the program's interpreter (`main`), so it imports
the standard library alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

SECONDS = 10.0
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes
PASSED, STOPPED = 57, 58  # exit codes; a program that ends by itself before its end has another

UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid"),
    *("--fork", "--kill-child", "--mount-proc"),
)

# Events (docs.python.org, Audit events) that end the program at once, by the beginning of their
# names: processes, sockets, foreign functions, limits, and changes of files.
FORBIDDEN = (
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
    *("subprocess.", "pty.", "os.kill", "socket.", "ctypes.", "resource.", "signal.pthread_kill"),
    *("os.chmod", "os.chown", "os.chflags", "os.lchmod", "os.lockf", "os.link", "os.symlink"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil."),
    *("os.setxattr", "os.removexattr", "os.unshare", "os.setns", "sqlite3."),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Outcome(NamedTuple):
    """Whether a program ran to its end without an error, and what happened otherwise."""

    passed: bool
    what: str


def run_program(source: str, *, seconds: float = SECONDS) -> Outcome:
    """Runs Python source in an interpreter of its own.

    seconds: of the clock and of computing. Raises ConfigError on other systems than Linux.
    """
    from lsjax.config import check  # not for the program's interpreter

    check(
        sys.platform == "linux",
        f"programs are run on Linux only, for its limits, not on {sys.platform}: leave out "
        "--allow-code-execution",
    )
    with tempfile.TemporaryDirectory(prefix="lsjax-program-") as folder:
        program, printed = Path(folder, "program.py"), Path(folder, "printed.txt")
        program.write_text(source, encoding="utf-8", errors="replace")
        interpreter = (sys.executable, "-I", "-S", "-B", __file__)
        command = [*isolation(), *interpreter, str(program), str(seconds)]
        with printed.open("wb") as stream:
            code = _run(command, folder, stream, seconds)
        last = printed.read_bytes()[-400:].decode(errors="replace").strip().splitlines()[-1:]
    what = last[0] if last else f"ended early with exit code {code}"
    what = f"took longer than {seconds:g} s" if code is None else what
    return Outcome(code == PASSED, "passed" if code == PASSED else what)


@lru_cache
def isolation() -> tuple[str, ...]:
    """What stands before a command to run it in namespaces of its own; nothing where that can't be
    had."""
    name, *options = UNSHARE
    prefix = (shutil.which(name) or name, *options)  # programs have no PATH to find it by
    try:
        subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return prefix


def _run(command: list[str], folder: str, stream: BinaryIO, seconds: float) -> int | None:
    """The exit code; None for a program that had to be stopped."""
    started = subprocess.Popen(
        command,
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return started.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # nothing of its group is left
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def limit(seconds: float) -> None:
    """Sets the limits of this process and of all that it would start."""
    import resource

    for name, value in (
        ("RLIMIT_CPU", int(seconds) + 10),  # behind the deadline, which says why
        ("RLIMIT_AS", MEMORY),
        ("RLIMIT_FSIZE", OUTPUT),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 64),  # threads count too; does not bind root
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it: writing would only fail
    # Ends what sleeps on when the process with the deadline has been killed.
    signal.setitimer(signal.ITIMER_REAL, seconds + 10)


def guard(event: str, arguments: tuple, write=os.write, leave=os._exit) -> None:
    """Ends the process at a forbidden event: an exception could be caught."""
    writes = event == "open" and (arguments[2] or 0) & WRITING
    if writes or event.startswith(FORBIDDEN):
        write(2, f"\nwas stopped at {event}\n".encode())
        leave(STOPPED)


def main(file: str, seconds: str) -> None:
    """Runs the program in `file`; exit code PASSED if it comes to its end."""
    with open(file, encoding="utf-8") as stream:
        source = stream.read()
    limit(float(seconds))
    sys.argv = ["program"]
    del os.mkfifo, os.mknod  # files that no event tells of
    sys.addaudithook(guard)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(PASSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
