"""A run on two hosts that evaluates and writes samples. Long: two processes compile all of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from lsjax.checkpoints.run import METRICS, read_metrics
from tests.test_train import write_config

ROOT = Path(__file__).parents[2]


def test_both_hosts_end_and_the_first_one_speaks(tmp_path):
    """Then the row of the last sample is deleted, and both hosts make the sample again."""
    config, run = write_config(tmp_path), tmp_path / "run"
    said = on_two_hosts(config, run, tmp_path / "cache")
    assert "step 6/6" in said[0] and "drafts of exit 2 were accepted" in said[0]
    assert own_lines(said[1]) == []
    kinds = ["evaluation", "sample"] * 2
    assert kinds_of_hooks(run) == kinds
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    samples = [number for number, line in enumerate(lines) if '"kind": "sample"' in line]
    del lines[samples[-1]]
    (run / METRICS).write_text("".join(lines))
    assert kinds_of_hooks(run) == kinds[:-1]
    said = on_two_hosts(config, run, tmp_path / "cache")
    assert "resumes after step 6" in said[0] and "drafts of exit 2 were accepted" in said[0]
    assert own_lines(said[1]) == []
    assert kinds_of_hooks(run) == kinds


def on_two_hosts(config: Path, run: Path, cache: Path) -> list[str]:
    """Trains in two processes that end well; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lsjax", "train", "--config", str(config), "--workdir"]
    command += [str(run), "--mesh.data", "2", "--evaluation.batches", "1"]
    command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes"]
    command += ["2", "--distributed.process-id"]
    environment = os.environ | {"LSJAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
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
    return [stdout for stdout, _ in said]


def own_lines(printed: str) -> list[str]:
    """Lines that are not of jax."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo]")]


def kinds_of_hooks(run: Path) -> list[str]:
    """Kinds of the rows of hooks, in their order."""
    return [row["kind"] for row in read_metrics(run) if row["kind"] in ("sample", "evaluation")]
