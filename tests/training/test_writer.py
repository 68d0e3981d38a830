"""The writer of a run directory: which lock it takes, and when it gives it back."""

from types import SimpleNamespace

import pytest

from lsjax.checkpoints.lock import LOCK
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.training import writer
from lsjax.training.run import Interrupted
from lsjax.training.writer import Writer


def test_a_directory_is_locked_within_the_context(tmp_path):
    run = tmp_path / "run"
    with Writer(run, pytest.fail) as ours:
        assert ours.holds() and (run / LOCK).exists()
        ours.check()
        with pytest.raises(CheckpointError, match="writes there"), Writer(run, pytest.fail):
            pass
    assert not run.exists()


def test_a_directory_that_can_not_be_made(tmp_path):
    (tmp_path / "file").touch()
    for directory, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        message = rf"{directory} can't be written \({reason}\): make it writable, or choose another"
        with pytest.raises(CheckpointError, match=message):
            Writer(tmp_path / directory, pytest.fail).__enter__()


@pytest.mark.parametrize(
    "processes, error, released",
    [
        (1, None, True),
        (1, ValueError("bad input"), True),
        (2, None, True),
        (2, Interrupted(15, 3), True),  # all stop after the same step
        (2, ValueError("this host fails"), False),  # the others may still write
    ],
)
def test_when_the_next_trainer_may_begin_at_once(tmp_path, monkeypatch, processes, error, released):
    done = []
    lock = SimpleNamespace(lost=lambda: "", release=lambda: done.append(True))
    monkeypatch.setattr(writer, "FileLock", lambda *_: lock)
    context = Writer(tmp_path, pytest.fail).__enter__()
    monkeypatch.setattr(writer.jax, "process_count", lambda: processes)
    context.__exit__(None if error is None else type(error), error, None)
    assert bool(done) == released


def test_a_lost_lock_is_an_error(tmp_path, monkeypatch):
    lock = SimpleNamespace(lost=lambda: "another trainer has it", release=lambda: None)
    monkeypatch.setattr(writer, "FileLock", lambda *_: lock)
    with Writer(tmp_path, pytest.fail) as ours:
        assert not ours.holds()
        with pytest.raises(CheckpointError, match="another trainer has it"):
            ours.check()
