"""docs/queued_tpu.sh, with a gcloud that runs what it is told to run on the workers right here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Answers `describe` with the next state. A word of an error stands for the error.
GCLOUD = """#!/bin/sh
set -f; echo gcloud $* >> "$LOG"; set +f
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
*describe*)
    state=$(next "$HERE/states")
    case $state in *_*) echo "ERROR: $state" >&2; exit 1 ;; *) echo "$state" ;; esac ;;
*" create "*) exit "$(next "$HERE/creates")" ;;
*" ssh "*)
    while [ "$1" != --command ]; do shift; done
    cd "$HERE/worker" && sh -c "$2" ;;
esac
"""
# Other commands of a worker, which note that they ran. `train` is the command that the user gave.
NOTED = """#!/bin/sh
echo "$(basename "$0") $* in $(basename "$PWD")" >> "$LOG"
"""
TRAIN = NOTED + 'code=$(head -n 1 "$HERE/codes"); sed -i 1d "$HERE/codes"; exit "$code"\n'
TAR = NOTED + "mkdir -p lsjax/.venv/bin && touch lsjax/.venv/bin/activate\n"
# What a slice is asked for, and what happens on it, until the training begins.
SLICE = "create pkill pgrep git scp tar python3 python3 python3 train"
AGAIN = " pkill pgrep train"


@pytest.mark.parametrize(
    "states, creates, codes, asked, code",
    [
        ("NOT_FOUND WAITING_FOR_RESOURCES ACTIVE", "0", "0", f"{SLICE} delete", 0),
        # Taken back while it trains: deleted, requested and installed again.
        (
            "NOT_FOUND ACTIVE SUSPENDED NOT_FOUND ACTIVE",
            "0 0",
            "1 0",
            f"{SLICE} delete {SLICE} delete",
            0,
        ),
        # Fails and begins again on the same slice, which is installed once.
        ("NOT_FOUND ACTIVE ACTIVE", "0", "1 0", SLICE + AGAIN + " delete", 0),
        ("NOT_FOUND" + " ACTIVE" * 5, "0", "2 2 2 2 2", SLICE + AGAIN * 4 + " delete", 1),
        # A failing command line or network ends it too.
        ("NOT_FOUND " * 5, "1 1 1 1 1", "", "create " * 5 + "delete", 1),
        ("BAD_GATEWAY " * 5, "", "", "delete", 1),
    ],
    ids=["trains", "preempted", "fails_once", "gives_up", "no_quota", "no_network"],
)
def test_what_it_asks(tmp_path, states, creates, codes, asked, code):
    (tmp_path / "worker").mkdir()
    words = {"states": states, "creates": creates, "codes": codes}
    for name, text in words.items():
        (tmp_path / name).write_text("\n".join(text.split()) + "\n")
    programs = {"gcloud": GCLOUD, "train": TRAIN, "tar": TAR, "pgrep": NOTED + "exit 1\n"}
    programs |= dict.fromkeys(("pkill", "git", "python3"), NOTED)
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {"ZONE": "z", "TYPE": "v5p-128", "RUNTIME": "v2-alpha-tpuv5", "PAUSE": "0"}
    own |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": f"{tmp_path}"}
    own |= {"LOG": f"{tmp_path / 'log'}", "TMPDIR": f"{tmp_path}"}
    command = ["sh", ROOT / "docs" / "queued_tpu.sh", "name", "train --config 'a b'"]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, timeout=60)
    assert done.returncode == code
    log = (tmp_path / "log").read_text().splitlines()
    kinds = []
    for line in log:
        program, *rest = line.split()
        if program == "gcloud":
            assert "--zone z" in line
            program = {"queued-resources": rest[3], "tpu-vm": rest[3]}[rest[2]]
        if program not in ("describe", "ssh"):
            kinds.append(program)
    assert kinds == asked.split()
    assert all(line.endswith("a b in lsjax") for line in log if line.startswith("train"))
