"""The loop with a step that only counts: when it saves, shows, stops."""

import os
import signal
import time
from concurrent.futures import Future
from contextlib import closing, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from lsjax.checkpoints.run import METRICS, read_metrics
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import CheckpointConfig, LlamaConfig, TrainConfig
from lsjax.training import run as loop
from lsjax.training.metrics import MetricsLog
from lsjax.training.run import Hook, Interrupted, TooManySkipped


def counting_step(broken=(), signal_at=None, number=signal.SIGTERM):
    """state.step + 1; the steps in `broken` are skipped; sends a signal in one of them."""

    def train_step(state, batch):
        step = state.step + 1
        in_a_row = state.in_a_row + 1 if step in broken else 0
        if step == signal_at:
            os.kill(os.getpid(), number)
        metrics = dict(
            loss=np.float32(np.nan if step in broken else 10 - step),
            last_exit_loss=np.float32(9 - step),
            exit_loss_L=np.float32([3, 0, 1]),
            enabled_L=np.array([True, False, True]),
            learning_rate=np.float32(0.5),
            skipped=np.int32(0),
            skipped_in_a_row=np.int32(in_a_row),
        )
        return SimpleNamespace(step=step, in_a_row=in_a_row, model=f"model {step}"), metrics

    return train_step


def start(step=0):
    return SimpleNamespace(step=step, in_a_row=0, model="model 0")


def run(tmp_path, state, saved, seen, num_steps=7, max_skipped=10, save_every=3, **options):
    """The loop on a run without data, and the log closed however it ends."""
    config = TrainConfig(
        num_steps=num_steps,
        batch_size=1,
        seq_len=2,
        model=LlamaConfig.tiny(),
        max_skipped=max_skipped,
        checkpoints=CheckpointConfig(every=save_every),
    )
    given = dict(
        train_step=counting_step(),
        next_batch=lambda: None,
        save=lambda state, step, data: saved.append(step) if step not in saved else None,
        settle=lambda: None,
        wait=lambda: None,
        check=lambda: None,
        hooks=[
            Hook("evaluation", 2, lambda step, model: seen.append((step, model)) or {"x": step})
        ],
        left=(),
        show=lambda step, line: None,
    )
    given |= options
    pipeline = SimpleNamespace(next=given.pop("next_batch"))
    known = SimpleNamespace(
        config=config,
        writer=SimpleNamespace(check=given.pop("check")),
        pipeline=pipeline,
        place=lambda batch: batch,
        data_position=dict,
    )
    names = "save", "settle", "wait"
    checkpoints = SimpleNamespace(**{name: given.pop(name) for name in names})
    checkpoints.newest = lambda: max(saved)
    log = MetricsLog(tmp_path, config, state.step, time.time())
    with closing(log):
        train_step, left = given.pop("train_step"), given.pop("left")
        return loop.TrainingLoop(known, state, checkpoints, log, **given).run(train_step, left)


def test_saves_and_hooks_come_at_their_steps_and_after_the_last(tmp_path):
    saved, seen, shown = [], [], []
    final = run(tmp_path, start(), saved, seen, show=lambda step, line: shown.append(step))
    assert final.step == 7
    assert seen == [(step, f"model {step}") for step in (2, 4, 6, 7)]
    assert saved == [2, 3, 6, 7]  # 2 is the first that is looked at
    assert shown == [1, 2, 3, 4, 5, 6, 7]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    step = next(row for row in rows if row["kind"] == "step")
    assert step["exits"] == [1, 3] and step["exit_losses"] == [3, 1]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [2, 4, 6, 7]


def test_a_signal_ends_the_run_with_its_step_saved(tmp_path):
    saved, seen = [], []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, start(), saved, seen, train_step=counting_step(signal_at=5))
    assert stopped.value.number == signal.SIGTERM and stopped.value.step == 5
    assert saved[-1] == 5
    assert read_metrics(tmp_path)[-1]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_before_the_first_step_is_not_noted(tmp_path):
    """The step is being compiled, and a state that is new or restored need not be saved."""
    saved, seen = [], []
    interrupted = counting_step(signal_at=1, number=signal.SIGINT)
    # Without a terminal, the tests may have been started with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(tmp_path, start(), saved, seen, train_step=interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stopped.value, Interrupted) and saved == []


def test_a_step_is_saved_before_hooks_look_at_it(tmp_path):
    """The first look of a start also waits until its step is on disk. So does the last one, which
    must be saved: whoever sent a signal may not wait."""
    order = []
    run(
        tmp_path,
        start(),
        [],
        [],
        train_step=counting_step(signal_at=7),
        save=lambda state, step, data: order.append(("save", step)),
        settle=lambda: order.append("settle"),
        wait=lambda: order.append("wait"),
        hooks=[
            Hook(kind, 2, lambda step, model: order.append(("look", step)) or {}) for kind in "ab"
        ],
    )
    looks = {step: [("look", step)] * 2 for step in (2, 4, 6, 7)}
    assert order == [
        *[("save", 2), "settle", *looks[2]],
        *[("save", 3), *looks[4]],
        *[("save", 6), *looks[6]],
        *[("save", 7), "wait", *looks[7]],
    ]


@pytest.mark.parametrize("signal_at, unsaved", [(None, 7), (5, 5)])
def test_a_last_step_that_is_not_saved_is_an_error(tmp_path, signal_at, unsaved):
    """No interruption that claims a saved step, and no hook."""
    seen = []

    def wait():
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        step = counting_step(signal_at=signal_at)
        run(tmp_path, start(), [], seen, train_step=step, wait=wait)
    assert read_metrics(tmp_path)[-1]["step"] == unsaved
    assert [step for step, _ in seen] == [step for step in (2, 4, 6) if step < unsaved]


def test_a_run_that_another_trainer_took_over_stops_before_it_saves(tmp_path):
    saved, seen = [], []

    def check():
        if saved == [2]:
            raise CheckpointError("another trainer writes there")

    with pytest.raises(CheckpointError, match="another trainer"):
        run(tmp_path, start(), saved, seen, check=check)
    assert saved == [2] and seen == [(2, "model 2")]


@pytest.mark.parametrize(("first", "later"), [(4, [6, 7]), (7, [])])
def test_hooks_that_are_left_come_first(tmp_path, first, later):
    saved, seen = [], []
    hook = Hook("evaluation", 2, lambda step, model: seen.append((step, model)) or {})
    run(tmp_path, start(first), saved, [], hooks=[hook], left=[hook])
    assert seen == [(first, "model 0"), *((step, f"model {step}") for step in later)]
    assert saved == later


def test_the_first_host_says_which_hooks_are_left(tmp_path, monkeypatch):
    """The disk of another host may show an older file."""
    hooks = [Hook(kind, 2, lambda *_: {}) for kind in ("evaluation", "sample")]
    (tmp_path / METRICS).write_text('{"kind": "evaluation", "step": 4}\n')
    known = SimpleNamespace(workdir=tmp_path, config=SimpleNamespace(num_steps=7))
    assert loop.unfinished(known, hooks, 4) == hooks[1:]
    assert loop.unfinished(known, hooks, 7) == hooks
    assert loop.unfinished(known, hooks, 5) == loop.unfinished(known, hooks, 0) == []
    first_host = np.array([True, False])
    monkeypatch.setattr(loop, "broadcast_one_to_all", lambda own: first_host)
    assert loop.unfinished(known, hooks, 4) == hooks[:1]


def test_a_hook_that_fails_loses_no_step(tmp_path):
    saved = []
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, start(), saved, [], hooks=[Hook("evaluation", 5, lambda *_: 1 / 0)])
    assert saved == [3, 5]


def test_many_skipped_steps_in_a_row_stop_the_run_without_a_checkpoint(tmp_path):
    saved, seen = [], []
    broken = counting_step(broken=(2, 4, 5, 6))
    with pytest.raises(TooManySkipped, match="3 steps in a row, up to step 6.*those of step 3"):
        run(tmp_path, start(), saved, seen, train_step=broken, max_skipped=3, num_steps=20)
    assert saved == [2, 3]
    assert read_metrics(tmp_path)[-1]["loss"] is None  # NaN is no JSON


def test_steps_that_are_done_again_are_in_the_log_once(tmp_path):
    saved, seen = [], []
    run(tmp_path, start(), saved, seen)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "st')  # a crash in the middle of a line
    run(tmp_path, start(3), saved, seen)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]


class AtOnce(nullcontext):
    """An executor without a thread."""

    def __enter__(self):
        return self

    def submit(self, function, *arguments):
        result = Future()
        result.set_result(function(*arguments))
        return result


def test_the_time_of_a_run_by_use(tmp_path, monkeypatch):
    """Data take 5 s and a step 2 s, so the devices wait for 3 s."""
    now, ends = 1000.0, {}

    def takes(seconds, result=None):
        nonlocal now
        now += max(0, seconds)
        return result

    def compiled():
        count, compiling = counting_step(), iter([100])

        def train_step(state, batch):
            takes(next(compiling, 0))
            ends[state.step + 1] = now + 2
            return count(state, batch)

        return train_step

    def end(metrics):
        return ends[10 - int(metrics["loss"])]

    fetch = loop.jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda own: takes(end(own) - now, fetch(own)))
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(loop, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(loop, "time_when_ready", end)
    options = dict(
        next_batch=lambda: takes(5),
        save=lambda *_, **__: takes(7),
        settle=lambda: takes(11),
        wait=lambda: takes(11),
        hooks=[Hook("evaluation", 3, lambda *_: takes(20, {}))],
    )
    options |= dict(num_steps=6, save_every=9)
    run(tmp_path, start(), [], [], train_step=compiled(), **options)
    rows = read_metrics(tmp_path)
    # Neither compiling nor hooks nor saving; those of 3 and 6 end before the next batch.
    assert [row["seconds"] for row in rows if row["kind"] == "step"] == [5, 5, 2, 10, 5, 2]
    uses = dict(steps=12, compiling=100, waiting_for_data=22, evaluation=40, checkpoints=36)
    uses |= dict(start=0, restarts=0, steps_done_again=0)
    last = dict(kind="time", step=6, began=1000)
    assert rows[-1] == {**last, "wall": now - 1000, **uses} and sum(uses.values()) == now - 1000

    takes(50)  # killed, and started again after step 3
    run(tmp_path, start(3), [], [], train_step=compiled(), **options)
    uses = dict(steps=12, compiling=200, waiting_for_data=33, evaluation=60, checkpoints=54)
    uses |= dict(start=0, restarts=50, steps_done_again=6)
    assert read_metrics(tmp_path)[-1] == {**last, "wall": now - 1000, **uses}
    assert sum(uses.values()) == now - 1000


def test_each_step_has_its_own_time(tmp_path, monkeypatch):
    """Steps take 2 s. The program waits for the end of step 4, as after a trace."""
    now, ends, count = 1000.0, {0: 1000.0}, counting_step()

    def train_step(state, batch):
        nonlocal now
        step = state.step + 1
        ends[step] = max(now, ends[step - 1]) + 2
        now = max(now, ends[4]) if step == 4 else now
        return count(state, batch)

    def end(metrics):
        return ends[10 - int(metrics["loss"])]

    def device_get(metrics):
        nonlocal now
        now = max(now, end(metrics))
        return metrics

    monkeypatch.setattr(loop.jax, "device_get", device_get)
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(loop, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(loop, "time_when_ready", end)
    run(tmp_path, start(), [], [], train_step=train_step, save_every=9)
    seconds = [row["seconds"] for row in read_metrics(tmp_path) if row["kind"] == "step"]
    assert seconds == [2] * 7 and now == 1014


def test_a_step_is_fetched_while_the_next_one_runs(tmp_path, monkeypatch):
    """Except before what needs a finished step: hooks at 4, the end."""
    order, count, fetch = [], counting_step(), loop.jax.device_get

    def train_step(state, batch):
        order.append(f"run {state.step + 1}")
        return count(state, batch)

    def device_get(metrics):
        order.append(f"fetch {10 - int(metrics['loss'])}")
        return fetch(metrics)

    monkeypatch.setattr(loop.jax, "device_get", device_get)
    hook = Hook("evaluation", 4, lambda step, model: order.append("look") or {})
    run(tmp_path, start(), [], [], train_step=train_step, hooks=[hook], save_every=9, num_steps=5)
    assert order[:7] == ["run 1", "run 2", "fetch 1", "run 3", "fetch 2", "run 4", "fetch 3"]
    assert order[7:] == ["fetch 4", "look", "run 5", "fetch 5", "look"]
