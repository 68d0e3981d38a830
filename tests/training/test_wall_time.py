"""The split of a run's wall time, for processes that end in any way."""

import time

import pytest

from lsjax.training.metrics import USES, Clock


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""
    return lambda now: monkeypatch.setattr(time, "time", lambda: now)


def row(clock, step):
    return {"kind": "time", "step": step, **clock.row()}


def step(number, seconds):
    return {"kind": "step", "step": number, "seconds": seconds}


def spent(clock):
    """The uses that took time, after a check that nothing is missing."""
    uses = {use: seconds for use, seconds in clock.row().items() if use in USES and seconds}
    assert clock.row()["wall"] == sum(uses.values()) == time.time() - clock.row()["began"]
    return uses


def test_steps_after_the_last_row_of_a_killed_process_are_done_again(at):
    at(103)
    clock = Clock([], 0, began=100)
    rows = [row(clock, 0)]
    at(110)
    clock.spend("steps")
    rows += [step(1, 7), row(clock, 1), step(2, 5), step(3, 5)]
    assert spent(clock) == dict(start=3, steps=7)
    at(200)
    clock = Clock(rows, 1, began=190)
    assert spent(clock) == dict(start=3, steps=7, steps_done_again=10, restarts=80)
    # The next one is killed before it saves, and its metrics keep only rows up to step 1.
    rows = [*rows[:3], row(clock, 1), step(2, 30)]
    at(300)
    clock = Clock(rows, 1, began=290)
    assert spent(clock) == dict(start=3, steps=7, steps_done_again=40, restarts=150)
    assert f"{clock}".startswith("wall time 0:03:20: steps 3.5%, steps done again 20.0%, ")


def test_time_until_the_devices_ended(at):
    at(100)
    clock = Clock([], 0, began=100)
    at(110)
    clock.spend("steps", 104)
    clock.spend("steps", 102)  # counted already
    clock.spend("waiting_for_data")
    assert spent(clock) == dict(steps=4, waiting_for_data=6)
    assert clock.lap() == 10 and clock.lap() == 0


def test_a_run_whose_metrics_have_no_times(at):
    """As earlier versions wrote them: counts from the process that resumes it."""
    at(103)
    clock = Clock([step(1, 7.0), step(2, 7.0)], 1, began=100)
    assert spent(clock) == dict(start=3)
