"""A lease on a run directory in a bucket, which has no locks."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lsjax.checkpoints.lock import LOCK, name_of, new_owner, taken
from lsjax.checkpoints.tensors import CheckpointError, Report
from lsjax.config import AnyPath
from lsjax.io.files import one_line

LEASE = 60.0  # seconds without a renewal after which the owner counts as dead


class Lease:
    """A file that its owner renews. A trainer that finds one watches it for the time of a lease. If
    it is renewed, the trainer is refused. Otherwise the owner is dead, and the trainer takes it.

    Each write names the generation of the file that it replaces, so only one of several trainers
    succeeds. Clocks of two machines are never compared. The owner counts from before it sends a
    renewal, and the other one from after it has seen it. So the owner stops first.
    """

    def __init__(
        self,
        directory: AnyPath,
        store: Any,
        report: Report,
        seconds: float = LEASE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """store: the directory as a tensorstore.KvStore. report: called with a line before it
        waits. Raises CheckpointError if another trainer has the lease, OSError without access."""
        self._directory, self._store = directory, store
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._own, self._lost = new_owner(), ""
        self._turn, self._over = threading.Lock(), threading.Event()
        try:
            self._generation, self._renewed = self._take(report)
        except CheckpointError:
            raise
        except Exception as error:  # of the network, the bucket, or the account's rights
            reason = one_line(error).partition(" [")[0]  # without the server's answer
            raise OSError(
                f"{directory} can't be written ({reason}): check that the bucket exists, and that "
                "this account may use it"
            ) from error
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _take(self, report: Report) -> tuple[bytes, float]:
        """Waits if there is an owner, and takes the lease; returns its generation and time."""
        first = found = self._read()
        since = self._clock()
        if found.state == "value":
            report(
                f"{self._directory}: {name_of(found.value)} was writing there: waiting for up to "
                f"{self._seconds:.0f} s to see whether it still is"
            )
        while found.state == "value" and self._clock() - since <= self._seconds:
            self._sleep(self._seconds / 60)
            found = self._read()
            if found.state == "value" and found.stamp.generation != first.stamp.generation:
                raise taken(self._directory, found.value)
        began = self._clock()
        generation = self._write(found.stamp.generation)
        if not generation:
            raise taken(self._directory, self._read().value)
        return generation, began

    def _read(self) -> Any:
        return self._store.read(LOCK).result(self._seconds / 2)

    def _write(self, replaced: bytes) -> bytes:
        """Writes this process as the owner if the file has the generation `replaced`. Returns the
        new generation, or nothing if another trainer was faster."""
        while True:
            writing = self._store.write(LOCK, self._own, if_equal=replaced)
            written = writing.result(self._seconds / 2)
            if written.generation:
                return written.generation
            found = self._read()
            if found.value != self._own:
                return b""
            replaced = found.stamp.generation  # of an earlier write, whose answer was lost

    def _keep(self) -> None:
        while not self._over.wait(self._seconds / 4):
            self.renew()

    def renew(self) -> None:
        """Renews the lease, unless another trainer has it or the bucket can't be reached."""
        with self._turn:
            if self._lost:
                return
            began = self._clock()
            try:
                generation = self._write(self._generation)
                now = b"" if generation else self._read().value
            except Exception:  # of the network: `lost` counts the time
                return
            if generation:
                self._generation, self._renewed = generation, began
                return
            self._lost = (
                f"{self._directory}: {name_of(now)} has begun to write there, because this one did "
                f"not renew its lease for {self._seconds:.0f} s: this one stops; to keep both, "
                "give each its own --workdir"
            )

    def lost(self) -> str:
        """Why this process may no longer write; empty while it may."""
        if self._age() > self._seconds:
            self.renew()  # the process may have been suspended
        if not self._lost and self._age() > self._seconds:
            self._lost = (
                f"{self._directory / LOCK} could not be renewed for {self._seconds:.0f} s, so "
                "another trainer may write there: check the bucket, then run the same command again"
            )
        return self._lost

    def _age(self) -> float:
        return self._clock() - self._renewed

    def release(self) -> None:
        """Removes the file, unless another trainer has taken it."""
        self._over.set()
        self._thread.join()
        with suppress(Exception):  # of the network: the next trainer waits
            removed = self._store.write(LOCK, None, if_equal=self._generation)
            removed.result(self._seconds / 2)


def store_of(directory: AnyPath) -> Any:
    """A directory in a bucket as a tensorstore.KvStore, whose writes can be conditional. It repeats
    failing requests for half a minute."""
    import tensorstore  # slow, and unused by runs on a disk

    bucket, _, path = str(directory).removeprefix("gs://").partition("/")
    spec = {
        "driver": "gcs",
        "bucket": bucket,
        "path": f"{path}/" if path else "",
        "context": {"gcs_request_retries": {"max_retries": 5}},
    }
    return tensorstore.KvStore.open(spec).result()
