"""Runs a program in this interpreter, with limits (sandbox.py). Imports only what it needs itself.

Standard input is a socket. A token comes from it, and is sent back if the program completes. While
the program runs, no variable holds the token, and no module, frame or traceback shows the guard.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

TOKEN_BYTES = 16
STOPPED = 58  # exit code after a forbidden event

# Prefixes of audit events (docs.python.org) that end the program at once: processes, sockets,
# foreign functions, limits, changes of files, and views of the guard.
FORBIDDEN = (
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
    *("subprocess.", "pty.", "os.kill", "socket.", "ctypes.", "resource.", "signal.pthread_kill"),
    *("os.chmod", "os.chown", "os.chflags", "os.lchmod", "os.lockf", "os.link", "os.symlink"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil."),
    *("os.setxattr", "os.removexattr", "os.unshare", "os.setns", "sqlite3.", "os.mkfifo"),
    *("os.mknod", "gc.get_", "sys._current_", "sys.settrace", "sys.setprofile", "sys.monitoring"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SILENT = ("mkfifo", "mknod")  # functions of os that change files without an audit event


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


def audit_silent_functions() -> None:
    """Replaces functions without an audit event by the event."""
    import _posixsubprocess
    import posix

    for module in (os, posix):
        for name in SILENT:
            setattr(module, name, partial(sys.audit, f"os.{name}"))
    _posixsubprocess.fork_exec = partial(sys.audit, "os.fork_exec")


def guard(
    event: str,
    arguments: tuple,
    # Defaults, because the names of this module are deleted and builtins may be replaced.
    forbidden: tuple[str, ...] = FORBIDDEN,
    writing: int = WRITING,
    fresh: tuple[str, ...] = ("posix", "_posixsubprocess"),
    write=os.write,
    leave=os._exit,
    code: int = STOPPED,
) -> None:
    """Ends the process at a forbidden event. The program could catch an exception.

    fresh: modules that are loaded. Importing them again would bring silent functions back.
    """
    writes = event == "open" and (arguments[2] or 0) & writing
    reloads = event == "import" and arguments[0] in fresh
    if writes or reloads or event.startswith(forbidden):
        write(2, f"\nwas stopped at {event}\n".encode())
        leave(code)


def main(file: str, seconds: str) -> None:
    """Runs the program in `file`. Sends the token back if the program completes."""
    source, size = Path(file).read_text(encoding="utf-8"), TOKEN_BYTES
    read, write, leave = os.read, os.write, os._exit
    limit(float(seconds))
    code = compile(source, "program.py", "exec")
    audit_silent_functions()
    sys.argv = ["program"]
    program = sys.modules["__main__"] = ModuleType("__main__")
    sys.addaudithook(guard)
    globals().clear()  # the program could find the guard's names by `sys._getframe`
    # The token is only on the stack of this expression, which Python code can't see.
    write(0, (read(0, size), exec(code, program.__dict__))[0])
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
