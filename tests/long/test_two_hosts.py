"""A run on two hosts that evaluates and writes samples. Long: two processes compile all of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from lsjax.checkpoints.run import read_metrics
from tests.test_train import write_config

ROOT = Path(__file__).parents[2]


def test_both_hosts_end_and_the_first_one_speaks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, run = write_config(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "lsjax", "train", "--config", str(config), "--workdir"]
    command += [str(run), "--mesh.data", "2", "--evaluation.batches", "1"]
    command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes"]
    command += ["2", "--distributed.process-id"]
    environment = os.environ | {"LSJAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    hosts = [
        subprocess.Popen(
            [*command, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [host.communicate(timeout=400) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "step 6/6" in said[0][0] and "drafts of exit 2 were accepted" in said[0][0]
    own = [line for line in said[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert own == []
    kinds = [row["kind"] for row in read_metrics(run) if row["kind"] in ("sample", "evaluation")]
    assert kinds == ["evaluation", "sample"] * 2
