"""The loop with a step that only counts: when it saves, shows, stops."""

import os
import signal
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lsjax.checkpoints import METRICS, read_metrics
from lsjax.training import trainer
from lsjax.training.metrics_log import MetricsLog
from lsjax.training.trainer import Hook, Interrupted, Loop, TooManySkipped


def counting_step(broken=(), signal_at=None):
    """state.step + 1; the steps in `broken` are skipped; sends SIGTERM in one of them."""

    def train_step(state, batch):
        step = state.step + 1
        in_a_row = state.in_a_row + 1 if step in broken else 0
        if step == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
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


def loop(tmp_path, saved, seen, *, steps=7, from_step=0, **options):
    settings = dict(
        num_steps=steps,
        train_step=counting_step(),
        next_batch=lambda: None,
        save=lambda step, state: saved.append(step) if step not in saved else None,
        wait=lambda: None,
        save_every=3,
        hooks=[
            Hook("evaluation", 2, lambda step, model: seen.append((step, model)) or {"x": step})
        ],
    )
    log = MetricsLog(tmp_path, from_step=from_step)
    return Loop(**(settings | options)), log


def run(loop, state, log):
    """`trainer.run`, and the log closed however it ends."""
    try:
        return trainer.run(loop, state, log)
    finally:
        log.close()


def test_saves_and_hooks_come_at_their_steps_and_after_the_last(tmp_path):
    saved, seen, shown = [], [], []
    one, log = loop(tmp_path, saved, seen, show=shown.append)
    final = run(one, start(), log)
    assert final.step == 7
    assert seen == [(step, f"model {step}") for step in (2, 4, 6, 7)]
    assert saved == [2, 3, 6, 7]  # 2 is the first that is looked at
    assert [report.step for report in shown] == [1, 2, 3, 4, 5, 6, 7]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["exits"] == [1, 3] and rows[0]["exit_losses"] == [3, 1]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [2, 4, 6, 7]


def test_a_signal_ends_the_run_with_its_step_saved(tmp_path):
    saved, seen = [], []
    one, log = loop(tmp_path, saved, seen, train_step=counting_step(signal_at=5))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run(one, start(), log)
    assert stopped.value.code == 128 + signal.SIGTERM and stopped.value.step == 5
    assert saved[-1] == 5
    assert read_metrics(tmp_path)[-1]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_step_is_saved_before_hooks_look_at_it(tmp_path):
    """The first look of a start also waits until its step is on disk. So does the last one, as
    whoever sent a signal may not wait."""
    order = []

    def look(step, model):
        order.append(("look", step))
        return {}

    one, log = loop(
        tmp_path,
        [],
        [],
        train_step=counting_step(signal_at=7),
        save=lambda step, state: order.append(("save", step)),
        wait=lambda: order.append("wait"),
        hooks=[
            Hook(kind, 2, lambda step, model: order.append(("look", step)) or {}) for kind in "ab"
        ],
    )
    run(one, start(), log)
    looks = {step: [("look", step)] * 2 for step in (2, 4, 6, 7)}
    assert order == [
        *[("save", 2), "wait", *looks[2]],
        *[("save", 3), *looks[4]],
        *[("save", 6), *looks[6]],
        *[("save", 7), "wait", *looks[7]],
    ]


def test_hooks_look_at_a_last_step_that_is_done(tmp_path):
    saved, seen = [], []
    one, log = loop(tmp_path, saved, seen, from_step=7)
    run(one, start(7), log)
    assert seen == [(7, "model 0")] and saved == []


def test_a_hook_that_fails_loses_no_step(tmp_path):
    saved = []
    one, log = loop(tmp_path, saved, [], hooks=[Hook("evaluation", 5, lambda *_: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        run(one, start(), log)
    assert saved == [3, 5]


def test_many_skipped_steps_in_a_row_stop_the_run_without_a_checkpoint(tmp_path):
    saved, seen = [], []
    broken = counting_step(broken=(2, 4, 5, 6))
    one, log = loop(tmp_path, saved, seen, train_step=broken, max_skipped=3, steps=20)
    with pytest.raises(TooManySkipped, match="3 steps in a row, up to step 6.*those of step 3"):
        run(one, start(), log)
    assert saved == [2, 3]
    assert read_metrics(tmp_path)[-1]["loss"] is None  # NaN is no JSON


def test_steps_that_are_done_again_are_in_the_log_once(tmp_path):
    saved, seen = [], []
    one, log = loop(tmp_path, saved, seen)
    run(one, start(), log)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "st')  # a crash in the middle of a line
    again, log = loop(tmp_path, saved, seen, from_step=3)
    run(again, start(3), log)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_is_fetched_while_the_next_one_runs(tmp_path, monkeypatch):
    """Except before what needs a finished step: hooks at 4, the end."""
    order, count, fetch = [], counting_step(), trainer.jax.device_get

    def train_step(state, batch):
        order.append(f"run {state.step + 1}")
        return count(state, batch)

    def device_get(metrics):
        order.append(f"fetch {10 - int(metrics['loss'])}")
        return fetch(metrics)

    monkeypatch.setattr(trainer.jax, "device_get", device_get)
    hook = Hook("evaluation", 4, lambda step, model: order.append("look") or {})
    one, log = loop(tmp_path, [], [], train_step=train_step, hooks=[hook], save_every=9, steps=5)
    run(one, start(), log)
    assert order[:7] == ["run 1", "run 2", "fetch 1", "run 3", "fetch 2", "run 4", "fetch 3"]
    assert order[7:] == ["fetch 4", "look", "run 5", "fetch 5", "look"]


def test_tensorboard_gets_the_numbers(tmp_path):
    """Scalars of the step and of each exit, read back from its file."""
    log = MetricsLog(tmp_path, from_step=0, tensorboard=True)
    log.write("step", 3, {"loss": np.float32(1.5), "exits": [2, 4], "on": True, "text": "x"})
    log.write("evaluation", 3, {"loss_E": [0.25, np.nan]})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert found == {
        ("step/loss", 3): 1.5,
        ("step/exits/1", 3): 2,
        ("step/exits/2", 3): 4,
        ("evaluation/loss_E/1", 3): 0.25,
    }
