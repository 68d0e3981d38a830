"""The lease on a run in a bucket: who gets it, who is refused, and who notices that it is lost.

tensorstore's store in memory stands for the bucket. A clock that only waiting moves stands for
time, so the threads of most leases do nothing here.
"""

import os
import threading
import time

import pytest
import tensorstore

from lsjax.checkpoints.lease import Lease
from lsjax.checkpoints.lock import LOCK
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import AnyPath, as_path

RUN: AnyPath = as_path("runs/a")


class Clock:
    """Seconds that pass while somebody sleeps; `at` does something at a time."""

    def __init__(self):
        self.now, self.plans = 1000.0, []

    def at(self, seconds: float, action) -> None:
        self.plans.append((self.now + seconds, action))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [plan for plan in self.plans if plan[0] <= self.now]
        self.plans = [plan for plan in self.plans if plan[0] > self.now]
        for _, action in due:
            action()


@pytest.fixture
def store():
    return tensorstore.KvStore.open("memory://").result()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def take(store, clock):
    """Takes a lease; `lines` gets what it says while it waits. All are released at the end."""
    leases = []

    def take(lines=None, store=store):
        report = pytest.fail if lines is None else lines.append
        lease = Lease(RUN, store, report, clock=clock.now_, sleep=clock.sleep)
        leases.append(lease)
        return lease

    clock.now_ = lambda: clock.now
    yield take
    for lease in leases:
        lease.release()


def owner(store) -> bytes:
    return store.read(LOCK).result().value


def test_a_free_directory_is_taken_at_once_and_is_free_again(store, clock, take):
    for _ in range(2):
        lease = take()
        assert f'"pid": {os.getpid()}' in owner(store).decode() and lease.lost() == ""
        lease.release()
        assert store.read(LOCK).result().state == "missing"
    assert clock.now == 1000


def test_whoever_sees_a_renewal_is_refused(store, clock, take):
    first, lines = take(), []
    clock.at(15, first.renew)
    with pytest.raises(CheckpointError, match=r"runs/a: another trainer \(process \d+ on .*there"):
        take(lines)
    assert 15 <= clock.now - 1000 <= 16
    (line,) = lines
    assert line.startswith(f"runs/a: another trainer (process {os.getpid()} on ")
    assert line.endswith("was writing there: waiting for up to 60 s to see whether it still is")
    assert first.lost() == ""


def test_the_lease_of_a_dead_owner_is_taken_after_its_time(store, clock, take):
    dead, before = take(), owner(store)
    second = take([])
    assert 60 < clock.now - 1000 < 62
    assert owner(store) != before and second.lost() == ""
    assert "has begun to write there, because this one did not renew its lease" in dead.lost()
    dead.renew()
    dead.release()  # not the other one's
    assert second.lost() == "" and owner(store)


def test_a_lease_that_is_given_back_is_taken_without_waiting_further(clock, take):
    first = take()
    clock.at(5, first.release)
    assert take([]).lost() == ""
    assert clock.now - 1000 < 7


def test_one_of_two_that_wait_for_a_dead_owner_gets_the_lease(store, take):
    take()
    results = []

    def wait():
        try:
            results.append(Lease(RUN, store, lambda line: None, seconds=0.2))
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = (result for result in results if isinstance(result, Lease))
    assert lease.lost() == "" and len(results) == 2
    lease.release()


def test_a_trainer_that_begins_at_the_same_moment_is_refused(store, clock, take):
    """Both have seen that the directory is free."""

    class Late:
        """A store in which another trainer is faster than each first write."""

        def __init__(self):
            self.first = None

        def read(self, key):
            return store.read(key)

        def write(self, *arguments, **options):
            if self.first is None:
                self.first = take()
            return store.write(*arguments, **options)

    with pytest.raises(CheckpointError, match="another trainer"):
        take(store=Late())


def test_an_owner_that_was_suspended_goes_on_if_nobody_came(clock, take):
    lease = take()
    clock.now += 1000
    assert lease.lost() == ""


class Away:
    """A store that fails, or whose answers are lost, while it is told to."""

    def __init__(self, store):
        self.store, self.fails, self.forgets = store, False, False

    def read(self, key):
        if self.fails:
            raise ValueError("UNAVAILABLE: no\nanswer")
        return self.store.read(key)

    def write(self, *arguments, **options):
        if self.fails:
            raise ValueError("UNAVAILABLE: no\nanswer")
        future = self.store.write(*arguments, **options)
        if self.forgets:
            future.result()
            raise TimeoutError
        return future


def test_a_lease_that_can_not_be_renewed_is_lost_after_its_time(store, clock, take):
    away = Away(store)
    lease = take(store=away)
    away.fails = True
    lease.renew()
    clock.now += 60
    assert lease.lost() == ""
    clock.now += 0.1
    said = "runs/a/writer.lock could not be renewed for 60 s, so another trainer may write there"
    assert lease.lost().startswith(said)
    away.fails = False
    lease.renew()
    assert lease.lost().startswith(said), "what was said stays true"


def test_a_renewal_without_an_answer_is_recognised(store, clock, take):
    """It is renewed anew, as another trainer may count from when it saw the first one."""
    away = Away(store)
    lease = take(store=away)
    away.forgets = True
    lease.renew()
    seen = store.read(LOCK).result().stamp.generation
    clock.now += 61
    away.forgets = False
    assert lease.lost() == ""
    assert store.read(LOCK).result().stamp.generation != seen


def test_a_removed_lease_is_lost(store, clock, take):
    """Another trainer may have come and gone."""
    lease = take()
    store.write(LOCK, None).result()
    lease.renew()
    assert "another trainer has begun to write there" in lease.lost()
    assert store.read(LOCK).result().state == "missing"


def test_a_bucket_that_can_not_be_reached(store, take):
    away = Away(store)
    away.fails = True
    with pytest.raises(
        OSError, match=r"^runs/a can't be written \(UNAVAILABLE: no answer\): check"
    ):
        take(store=away)


def test_a_thread_renews_the_lease(store):
    lease = Lease(RUN, store, pytest.fail, seconds=0.2)
    before = store.read(LOCK).result().stamp.generation
    end = time.monotonic() + 10
    while store.read(LOCK).result().stamp.generation == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(CheckpointError):
        Lease(RUN, store, lambda line: None, seconds=0.2)
    lease.release()
    assert store.read(LOCK).result().state == "missing"
