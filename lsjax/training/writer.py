"""The right to write in a run directory, which process 0 holds for all hosts of a run."""

from contextlib import AbstractContextManager

import jax

from lsjax.checkpoints.lease import Lease, store_of
from lsjax.checkpoints.lock import FileLock
from lsjax.checkpoints.tensors import CheckpointError, Report
from lsjax.config import AnyPath, in_bucket
from lsjax.training.hosts import first_decides


class Writer(AbstractContextManager):
    """The only writer of a run directory, within the context. The directory is made if missing.

    report: called with a line before it waits for a sign of life of another trainer. Also called
    with a line if the file system has no locks. Raises CheckpointError on all hosts if another
    trainer writes there, or if the directory can't be written.
    """

    def __init__(self, directory: AnyPath, report: Report = print):
        self.directory, self._report = directory, report
        self._lock: FileLock | Lease | None = None  # of process 0

    def __enter__(self) -> "Writer":
        first_decides(self._take)
        return self

    def _take(self) -> None:
        if in_bucket(self.directory):
            self._lock = Lease(self.directory, store_of(self.directory), self._report)
        else:
            self._lock = FileLock(self.directory, self._report)

    def __exit__(self, error, *_) -> None:
        if self._lock is None:
            return
        # After an error of one host, the others may still write. Then a lease ends by itself.
        if error is None or not issubclass(error, Exception) or jax.process_count() == 1:
            self._lock.release()

    def holds(self) -> bool:
        """Whether this process may still write, as far as it knows."""
        return self._lock is None or not self._lock.lost()

    def check(self) -> None:
        """Raises CheckpointError on all hosts if another trainer may write there now."""
        first_decides(self._check)

    def _check(self) -> None:
        lost = "" if self._lock is None else self._lock.lost()
        if lost:
            raise CheckpointError(lost)
