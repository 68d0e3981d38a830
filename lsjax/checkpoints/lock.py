"""One writer per run directory. On a disk it holds a lock; in a bucket a lease (lease.py).

    RUN/writer.lock     host and process of the trainer that writes there, while it runs

A second trainer would replace and remove the saved steps of the first. Readers need no lock.
"""

import errno
import fcntl
import json
import os
import socket
import uuid
from contextlib import suppress
from typing import IO

from lsjax.checkpoints.tensors import CheckpointError, Report
from lsjax.config import AnyPath

LOCK = "writer.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def new_owner() -> bytes:
    """Content of the file: this process, and an id that no other owner has."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    return json.dumps(about).encode()


def name_of(owner: bytes) -> str:
    """The owner in words."""
    try:
        return "another trainer (process {pid} on {host})".format(**json.loads(owner))
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another trainer"


def taken(directory: AnyPath, owner: bytes) -> CheckpointError:
    """The error of a trainer that is refused."""
    return CheckpointError(
        f"{directory}: {name_of(owner)} writes there: wait until it ends, stop it, or choose "
        "another --workdir"
    )


class FileLock:
    """flock on a file of the directory. The system releases it when this process ends, however it
    ends. Programs that this process starts do not inherit it."""

    def __init__(self, directory: AnyPath, report: Report):
        """Makes the directory if it is missing. report: called with a line if the file system has
        no locks. Raises CheckpointError if another trainer has the lock, OSError without access."""
        self._directory = directory
        self._made = [one for one in (directory, *directory.parents) if not one.exists()]
        try:
            self._file = self._locked(report)
        except OSError as error:
            raise OSError(
                f"{directory} can't be written ({error.strerror}): make it writable, or choose "
                "another --workdir"
            ) from error
        with suppress(OSError):  # on a full disk only the name is missing
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), new_owner())

    def _locked(self, report: Report) -> IO[bytes]:
        path = self._directory / LOCK
        while True:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    raise taken(self._directory, file.read()) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    file.close()
                    raise
                report(
                    f"{self._directory} is on a file system without locks ({error.strerror}): make "
                    "sure that no other trainer writes there"
                )
            with suppress(FileNotFoundError):  # its last holder has just removed it
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def lost(self) -> str:
        """Why this process may no longer write: a lock is never lost."""
        return ""

    def release(self) -> None:
        """Removes the file, and the directories that were made for it and are still empty."""
        (self._directory / LOCK).unlink(missing_ok=True)
        self._file.close()
        for directory in self._made:
            with suppress(OSError):  # a run has begun there
                directory.rmdir()
