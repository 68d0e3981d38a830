"""docs/queued_tpu.sh, with a gcloud that only writes down what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Answers `describe` with the next state, and the training command with the next exit code.
GCLOUD = """#!/bin/sh
next() { head -n 1 "$1"; sed -i 1d "$1"; }
echo "$*" >> log
case "$*" in
*describe*) next states ;;
*"train.py --x"*) exit "$(next codes)" ;;
esac
"""


@pytest.mark.parametrize(
    "states, codes, kinds, code",
    [
        # Waits for the slice, trains, and the training ends.
        ("|WAITING_FOR_RESOURCES|ACTIVE", "0", "create ssh scp ssh train", 0),
        # Taken back while it trains: deleted, requested and installed again.
        (
            "|ACTIVE|SUSPENDED||ACTIVE",
            "1|0",
            "create ssh scp ssh train delete create ssh scp ssh train",
            0,
        ),
        # Fails and is begun again on the same slice, which is installed once.
        ("|ACTIVE|ACTIVE", "1|0", "create ssh scp ssh train ssh train", 0),
        ("|ACTIVE" + "|ACTIVE" * 4, "2|2|2|2|2", "create ssh scp ssh train" + " ssh train" * 4, 1),
    ],
    ids=["trains", "preempted", "fails_once", "gives_up"],
)
def test_what_it_asks_of_gcloud(tmp_path, states, codes, kinds, code):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text(states.replace("|", "\n") + "\n")
    (tmp_path / "codes").write_text(codes.replace("|", "\n") + "\n")
    own = {"ZONE": "z", "TYPE": "v5p-128", "RUNTIME": "v2-alpha-tpuv5", "PAUSE": "0"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", ROOT / "docs" / "queued_tpu.sh", "name", "python train.py --x"]
    done = subprocess.run(command, cwd=tmp_path, env=own | path, timeout=60, check=False)
    assert done.returncode == code
    asked = []
    for line in (tmp_path / "log").read_text().splitlines():
        if line.startswith("compute tpus") and "describe" not in line:
            assert line.endswith("--zone z") or "--command" in line
            words = ("train.py --x", "create", "delete", "scp", "ssh")
            asked.append(next(word for word in words if word in line).split(".")[0])
    assert asked == kinds.split()
