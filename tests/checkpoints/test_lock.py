"""The lock on a run directory: who gets it, when it is free again, and what stays."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lsjax.checkpoints import lock
from lsjax.checkpoints.lock import LOCK, FileLock
from lsjax.checkpoints.tensors import CheckpointError

HOLD = """
import subprocess, sys
from pathlib import Path
from lsjax.checkpoints.lock import FileLock

held = FileLock(Path(sys.argv[1]), print)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
print(child.pid, flush=True)
input()
"""


@pytest.fixture
def run(tmp_path) -> Path:
    directory = tmp_path / "runs" / "a"
    directory.mkdir(parents=True)
    return directory


def take(directory: Path) -> FileLock:
    return FileLock(directory, report=pytest.fail)


def test_a_second_trainer_is_refused_until_the_first_ends(run):
    first = take(run)
    with pytest.raises(CheckpointError) as error:
        take(run)
    assert str(error.value) == (
        f"{run}: another trainer (process {os.getpid()} on {lock.socket.gethostname()}) writes "
        "there: wait until it ends, stop it, or choose another --workdir"
    )
    assert first.lost() == ""
    first.release()
    assert list(run.iterdir()) == []
    take(run).release()


def test_an_owner_that_has_not_written_its_name_yet(run):
    with (run / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="a: another trainer writes there: wait until"):
            take(run)


def test_a_killed_trainer_frees_the_lock_and_its_children_do_not_keep_it(run):
    command = [sys.executable, "-c", HOLD, str(run)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as program:
        child = int(program.stdout.readline())
        with pytest.raises(CheckpointError, match=f"process {program.pid} on"):
            take(run)
        program.kill()
        program.wait()
    try:
        os.kill(child, 0)  # it still runs
        take(run).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_directories_that_were_made_for_nothing_are_removed(tmp_path):
    made = take(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / LOCK).exists()
    made.release()
    assert list(tmp_path.iterdir()) == []
    begun = take(tmp_path / "new" / "run")
    (tmp_path / "new" / "run" / "config.json").touch()
    begun.release()
    assert [file.name for file in (tmp_path / "new" / "run").iterdir()] == ["config.json"]


def test_a_lock_that_is_removed_while_another_trainer_opens_it(run, monkeypatch):
    """What the other one has locked is no longer the file of that name."""
    first, held, flock = take(run), [], fcntl.flock

    def late(file, how):
        if not held:
            held.append(file)
            first.release()
        return flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    second = take(run)
    assert held[0].closed
    with pytest.raises(CheckpointError):
        take(run)
    second.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(run, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    lines: list[str] = []
    FileLock(run, lines.append).release()
    (line,) = lines
    assert line == (
        f"{run} is on a file system without locks ({os.strerror(number)}): make sure that no "
        "other trainer writes there"
    )


def test_other_errors_of_the_file_system_are_raised(run, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"):
        take(run)
