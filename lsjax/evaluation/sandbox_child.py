"""The interpreter in which a program of a model runs (sandbox.py): limits, then the program.

Runs without site-packages, so it imports the standard library alone.
"""

import os
import sys

PASSED, STOPPED = 57, 58  # exit codes; a program that ends by itself before its end has another

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


def limit(seconds: float, memory: int, output: int) -> None:
    """Sets the limits of this process and of all that it would start."""
    import resource
    import signal

    for name, value in (
        ("RLIMIT_CPU", int(seconds) + 10),  # behind the deadline, which says why
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", output),
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


def main(file: str, seconds: str, memory: str, output: str) -> None:
    """Runs the program in `file`; exit code PASSED if it comes to its end."""
    with open(file, encoding="utf-8") as stream:
        source = stream.read()
    limit(float(seconds), int(memory), int(output))
    sys.argv = ["program"]
    del os.mkfifo, os.mknod  # files that no event tells of
    sys.addaudithook(guard)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(PASSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
