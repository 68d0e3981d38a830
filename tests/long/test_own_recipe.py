"""A script with functions of its own, killed and resumed. Long: four processes compile its step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsjax.checkpoints.run import read_metrics
from lsjax.checkpoints.steps import PARAMS, TRAIN, saved_steps

ROOT, SCRIPT = Path(__file__).parents[2], Path(__file__).parent / "own_recipe.py"


@pytest.fixture
def start(tmp_path):
    """Starts the script in a directory of a run."""
    environment = os.environ | {"LSJAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def started(workdir: Path) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), str(workdir)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return started


def test_it_goes_on_bit_for_bit(start, tmp_path):
    """After two kills at different steps. The saved arrays are those of a run without."""
    assert len(SCRIPT.read_text().splitlines()) <= 40
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with start(whole) as process:
        said = process.communicate()[0]
    assert process.returncode == 0 and "step 24/24" in said
    for step in (6, 15):
        with start(cut) as process:
            while not any(one.number >= step for one in saved_steps(cut / "checkpoints")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
    with start(cut) as process:
        said = process.communicate()[0]
    assert process.returncode == 0 and "resumes after step" in said
    arrays = [saved_steps(run / "checkpoints")[0].meta["arrays"] for run in (whole, cut)]
    assert arrays[0] == arrays[1] and {PARAMS, TRAIN} <= arrays[0].keys()
    assert any("mu" in name for name in arrays[0][TRAIN])
    exits = {row["step"]: row["exits"] for row in read_metrics(cut) if row["kind"] == "step"}
    assert exits[1] == [4] and exits[7] == [3, 4] and exits[24] == [1, 2, 3, 4]
