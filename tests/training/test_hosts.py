"""Several processes of one run: two real ones over loopback, and what is wrong with the flags."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lsjax.config import ConfigError
from lsjax.training import hosts
from lsjax.training.hosts import Hosts, ending_together, in_turn, start, under_slurm

PROGRAM = """
import itertools
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from lsjax.training.hosts import Hosts, check_same, ending_together, in_turn, signals, start
from lsjax.training.hosts import first_decides, wait_to_see
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import ConfigError, MeshConfig
from lsjax.sharding import make_mesh, own_rows, placed_rows

port, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])


def say(*what):
    # Not to the standard output, which gloo's threads write to whenever they like.
    with (directory / f"said_{number}").open("a") as file:
        print(*what, file=file)


def check(condition, said):
    if not condition:
        raise CheckpointError(said)


def refused(function, *arguments):
    try:
        function(*arguments)
    except (ConfigError, CheckpointError) as error:
        say(error)


with ending_together():
    start(Hosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number))

    with in_turn("written"):
        if number == 0:
            time.sleep(0.5)
            (directory / "file").write_text("here")
        wait_to_see((directory / "file").exists, "the file")
    check_same("the files", (directory / "file").read_text())
    refused(check_same, "the numbers", f"{number}")
    refused(make_mesh, MeshConfig())
    first_decides(lambda: say("first"))
    refused(first_decides, lambda: check(number > 0, "é" + "x" * 2000))

    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    tokens_BT = np.arange(24, dtype=np.int32).reshape(8, 3)
    own_B = own_rows(8, mesh)
    say(own_B.tolist(), own_rows(8, make_mesh(MeshConfig(slices=2, data=2))).tolist())
    placed = placed_rows({"tokens_BT": tokens_BT[own_B]}, 8, mesh)["tokens_BT"]
    assert len(placed.addressable_shards) == 2
    assert np.array_equal(process_allgather(placed, tiled=True), tokens_BT)

    with signals() as stop:
        for step in itertools.count(1):
            jax.block_until_ready(placed + 1)
            if step == 5 and number == 1:
                signal.raise_signal(signal.SIGTERM)
            if stop(step) is not None:
                break
            time.sleep(0.02)
    say("stopped after", process_allgather(np.array(step)).tolist() == [step, step], step > 4)
    if number == 1:
        raise RuntimeError("this one fails")
    jax.block_until_ready(placed.sum())
    time.sleep(60)
"""


@pytest.mark.long
def test_two_processes(tmp_path):
    """They take turns, shard rows, stop together, and end when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(number), str(tmp_path)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        _, err = programs[1].communicate(timeout=300)
    finally:
        programs[0].kill()
    programs[0].communicate()
    assert programs[1].returncode == 1 and err.rstrip().endswith("RuntimeError: this one fails")
    said = [
        "the numbers differ between process 0 and [1]: start all with the same command and a "
        "shared disk",
        "a mesh of 1 devices, but 2 processes have 4: set one of --mesh.data, --mesh.fsdp and "
        "--mesh.tensor to -1, which takes the rest",
    ]
    for number, own in enumerate(["[0, 1, 2, 3]", "[4, 5, 6, 7]"]):  # a slice each
        lines = (tmp_path / f"said_{number}").read_text().splitlines()
        decided = ["first"] * (number == 0) + ["é" + "x" * 599]
        assert lines == [*said, *decided, f"{own} {own}", "stopped after True True"]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(coordinator="a:1"), "must be given together: give all three"),
        (dict(num_processes=2, process_id=0), "must be given together: give all three"),
        (dict(coordinator="a", num_processes=2, process_id=0), "'a' is not host:port"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "process-id 2 is not in 0..1"),
        (dict(heartbeat_timeout=0), "heartbeat-timeout 0 must be a whole number of at least 1"),
    ],
)
def test_what_is_wrong_with_the_flags(given, message):
    with pytest.raises(ConfigError, match=message):
        Hosts(**given)


def test_slurm_and_tpu_vms_are_found_without_a_flag(monkeypatch):
    asked = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *_, **how: asked.append(how))
    start(Hosts())
    assert asked == []
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not under_slurm()
    monkeypatch.setenv("SLURM_NTASKS", "2")
    start(Hosts(heartbeat_timeout=7))
    times = dict(heartbeat_timeout_seconds=7, initialization_timeout=300)
    assert asked == [dict(cluster_detection_method="slurm", **times)]
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setattr(hosts, "on_tpu_vm", lambda: True)
    start(Hosts(heartbeat_timeout=7))
    assert asked[1:] == [dict(cluster_detection_method=None, **times)]


def test_a_start_that_fails(monkeypatch):
    def fail(*flags, **how):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", fail)
    monkeypatch.setattr(hosts, "on_tpu_vm", lambda: True)
    start(Hosts())  # a TPU without neighbours
    with pytest.raises(ConfigError, match="could not connect .coordinator_address should"):
        start(Hosts(coordinator="a:1", num_processes=2, process_id=0))


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            ValueError("UNKNOWN: Gloo AllGather failed: Read error"),
            1,
            "error: process 0 cannot continue",
        ),
        (
            RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"),
            1,
            "error: process 0 cannot continue",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "Traceback"),
        (SystemExit(2), 2, ""),
    ],
)
def test_a_process_that_fails_says_why_and_ends(monkeypatch, capfd, error, code, said):
    codes = []
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.os, "_exit", codes.append)
    with ending_together():
        raise error
    assert codes == [code] and capfd.readouterr().err.startswith(said)


def test_one_process_is_as_it_was():
    with in_turn("nothing to wait for"), pytest.raises(SystemExit), ending_together():
        raise SystemExit(3)
