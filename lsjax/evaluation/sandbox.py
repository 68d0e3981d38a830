"""Runs a program that a model wrote, with limits. They guard against accidents and are not a
security boundary: run programs that may be hostile on a separate machine.

    time                        a deadline here, and RLIMIT_CPU
    memory, output              RLIMIT_AS, RLIMIT_FSIZE
    processes, files, sockets   an audit hook in the program's interpreter
    network                     separate namespaces, if unshare works

The program gets an empty environment and only the standard library. When it ends, its process
group is killed. This file also runs in the program's interpreter (`main`), so it imports only the
standard library.
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
from typing import BinaryIO

PASSED, STOPPED = 57, 58  # exit codes; a program that exits early has another

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid")
UNSHARE += ("--fork", "--kill-child", "--mount-proc")

# Prefixes of audit events (docs.python.org) that end the program at once: processes, sockets,
# foreign functions, limits, and changes of files.
FORBIDDEN = (
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
    *("subprocess.", "pty.", "os.kill", "socket.", "ctypes.", "resource.", "signal.pthread_kill"),
    *("os.chmod", "os.chown", "os.chflags", "os.lchmod", "os.lockf", "os.link", "os.symlink"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil."),
    *("os.setxattr", "os.removexattr", "os.unshare", "os.setns", "sqlite3."),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def run_program(source: str, *, seconds: float = 10.0) -> str | None:
    """Runs Python source in a separate interpreter. Returns why it did not run to its end, or None.

    seconds: limit of wall-clock time. Raises ConfigError on systems other than Linux.
    """
    from lsjax.config import check  # not for the program's interpreter

    check(
        sys.platform == "linux",
        f"programs run only on Linux, whose limits they need, not on {sys.platform}: leave out "
        "--allow-code-execution",
    )
    with tempfile.TemporaryDirectory(prefix="lsjax-program-") as folder:
        program, printed = Path(folder, "program.py"), Path(folder, "printed.txt")
        program.write_text(source, encoding="utf-8", errors="replace")
        interpreter = (sys.executable, "-I", "-S", "-B", __file__)
        command = [*isolation(), *interpreter, str(program), str(seconds)]
        with printed.open("wb") as stream:
            code = _run(command, folder, stream, seconds)
        lines = printed.read_bytes()[-400:].decode(errors="replace").strip().splitlines()
    if code is None:
        return f"took longer than {seconds:g} s"
    reason = lines[-1] if lines else f"ended early with exit code {code}"
    return None if code == PASSED else reason


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


def _run(command: list[str], folder: str, stream: BinaryIO, seconds: float) -> int | None:
    """The exit code; None if the program was stopped at the deadline."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
    started = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **streams)
    try:
        return started.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # the group has ended
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def limit(seconds: float) -> None:
    """Sets the limits of this process and its children."""
    import resource

    for name, value in (
        ("RLIMIT_CPU", int(seconds) + 10),  # after the deadline, which has a clearer message
        ("RLIMIT_AS", 1 << 30),  # bytes of address space
        ("RLIMIT_FSIZE", 1 << 20),  # bytes
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 64),  # threads count too; does not bind root
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it by default
    # Ends a sleeping program if the process with the deadline was killed.
    signal.setitimer(signal.ITIMER_REAL, seconds + 10)


def guard(event: str, arguments: tuple, write=os.write, leave=os._exit) -> None:
    """Ends the process at a forbidden event. The program could catch an exception."""
    writes = event == "open" and (arguments[2] or 0) & WRITING
    if writes or event.startswith(FORBIDDEN):
        write(2, f"\nwas stopped at {event}\n".encode())
        leave(STOPPED)


def main(file: str, seconds: str) -> None:
    """Runs the program in `file`. The exit code is PASSED if the program completes."""
    source = Path(file).read_text(encoding="utf-8")
    limit(float(seconds))
    sys.argv = ["program"]
    del os.mkfifo, os.mknod  # they make files without an audit event
    sys.addaudithook(guard)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(PASSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
