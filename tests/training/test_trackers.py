"""What TensorBoard and Weights & Biases get, of runs that are killed too."""

import os
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from lsjax.checkpoints.run import read_metrics
from lsjax.config import ConfigError, LlamaConfig, TrainConfig
from lsjax.training.metrics import MetricsLog

CONFIG = dict(num_steps=9, batch_size=1, seq_len=2, model=LlamaConfig.tiny())
EXITS = {"step/exits/1": 2, "step/exits/2": 4}


def written(log, *steps):
    for step in steps:
        row = {"loss": np.float32(step / 2), "exits": [2, 4], "on": True, "seconds": 1.0}
        log.write("step", step, row)


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    """Scalars of the step and of each exit, read back from its files; each once."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    config = TrainConfig(**CONFIG, tensorboard=True)
    log = MetricsLog(tmp_path, config, 0, 0.0)
    written(log, 3, 4)
    log.write("evaluation", 3, {"loss_E": [0.25, np.nan], "text": "x"})
    log.close()
    monkeypatch.setattr(time, "time", lambda: 2e9)  # which names the second file
    MetricsLog(tmp_path, config, 3, 0.0).close()
    found, purged = {}, []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            if event.session_log.status == SessionLog.START:
                purged.append(event.step)
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    assert {name: value for name, value in found.items() if name[0][:5] != "time/"} == {
        **{(name, step): value for name, value in EXITS.items() for step in (3, 4)},
        **{("step/loss", step): step / 2 for step in (3, 4)},
        **{("step/seconds", step): 1 for step in (3, 4)},
        ("evaluation/loss_E/1", 3): 0.25,
    }
    assert purged[-1] == 4


@pytest.fixture
def server(monkeypatch):
    """A stand-in for wandb: the rows that its server has, and the number that it loses."""
    server = SimpleNamespace(runs={}, lost=0)

    class Run:
        def __init__(self, id):
            self.rows = server.runs.setdefault(id, [])
            self.step = self.rows[-1][0] + 1 if self.rows else 0

        def log(self, row, step):
            self.rows.append((step, row))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            del self.rows[len(self.rows) - server.lost :]

    module = ModuleType("wandb")
    module.Error, module.Settings = type("Error", (Exception,), {}), SimpleNamespace
    module.init = lambda *, id, **_: Run(id)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return server


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_resumed_run_goes_on_at_wandb(tmp_path, server, lost):
    """Killed after step 3, saved after step 2; the server lacks the last rows, or none."""
    config = TrainConfig(**CONFIG, wandb=True)
    log, server.lost = MetricsLog(tmp_path, config, 0, 0.0), lost
    written(log, 1, 2, 3)
    log.close()
    log, server.lost = MetricsLog(tmp_path, config, 2, 0.0), 0
    written(log, 3, 4)
    log.close()
    (rows,) = server.runs.values()
    losses = [(step, row["step/loss"]) for step, row in rows if "step/loss" in row]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert rows[-1][1] == {**EXITS, "step/loss": 2.0, "step/seconds": 1}


def test_two_runs_are_two_at_wandb(tmp_path, server):
    for name, began in (("a", 1e9), ("b", 1e9 + 1e-3)):
        (tmp_path / name).mkdir()
        MetricsLog(tmp_path / name, TrainConfig(**CONFIG, wandb=True), 0, began).close()
    assert len(server.runs) == 2


def test_wandb_that_does_not_start(tmp_path, server, monkeypatch):
    """One line; the rows of the run stay."""
    log = MetricsLog(tmp_path, TrainConfig(**CONFIG), 0, 0.0)
    written(log, 1, 2)
    log.close()
    before = read_metrics(tmp_path)

    def init(**_):
        raise sys.modules["wandb"].Error("No API key\n configured.")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    words = r"^wandb can't start \(No API key configured\.\): run `wandb login`, set WANDB_MODE=off"
    with pytest.raises(ConfigError, match=words):
        MetricsLog(tmp_path, TrainConfig(**CONFIG, wandb=True), 1, 0.0)
    assert read_metrics(tmp_path) == before


KILLED = """
import os, signal, sys
from lsjax.config import LlamaConfig, TrainConfig, as_path
from lsjax.training.metrics import MetricsLog

config = TrainConfig(num_steps=9, batch_size=1, seq_len=2, model=LlamaConfig.tiny(), wandb=True)
log = MetricsLog(as_path(sys.argv[1]), config, int(sys.argv[2]), 1e9)
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
    log.write("step", step, {"loss": step / 2, "seconds": 1.0})
if sys.argv[4] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the wandb extra")
def test_a_killed_run_is_one_run_of_wandb_offline(tmp_path):
    """Its own files hold each step once, read by its own reader."""
    environment = {**os.environ, "WANDB_MODE": "offline"}

    def launch(*arguments):
        command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, arguments)]
        return subprocess.run(command, env=environment, check=False).returncode

    assert launch(0, 500, "killed") == -signal.SIGKILL
    assert launch(400, 600, "killed") == -signal.SIGKILL
    assert launch(550, 700, "ended") == 0
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    steps = [one.history.step.num for one in records(file) if one.HasField("history")]
    assert sorted({*steps}) == [*range(701)]
    losses = [
        float(item.value_json)
        for one in records(file)
        for item in one.history.item
        if "step/loss" in (item.key, *item.nested_key)
    ]
    assert losses == [step / 2 for step in range(1, 701)]


def records(file):
    """The records of wandb's file: blocks of 32 KB with parts of records, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another head
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""
