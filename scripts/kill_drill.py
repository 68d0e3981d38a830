"""Kills a training run again and again, and compares its end with that of an undisturbed one.

    python scripts/kill_drill.py --directory /tmp/drill --command \\
        "python train.py --config configs/quickstart.py --workdir {workdir} --num-steps 300 \\
         --checkpoints.every 5 --checkpoints.keep-last 3"

The command runs to its end in DIRECTORY/undisturbed. Then it runs in DIRECTORY/killed, gets kill -9
at a random moment (of every second run once it trains, of the others from its start on), and is
started again, until it has been killed often enough and may end too. Parameters, optimizer state,
counters, the position in the data and the logged losses must then be the same, bit for bit, no
saved step may have been damaged, and no restart may have gone back behind a saved step.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from lsjax.cli.errors import one_line_errors
from lsjax.config import check
from lsjax.model.run_directory import CHECKPOINTS
from lsjax.model.saved_steps import PARAMS, TRAIN, SavedStep, saved_steps

POLL = 0.005  # seconds between looks at the run


def main(command: str, directory: Path, kills: int = 20, seed: int = 0) -> None:
    """Runs the drill; exits with 1 where the two runs differ.

    Args:
        command: the training command, with {workdir} for its directory.
        directory: where the two runs are made, anew.
        kills: how often the second run is killed.
        seed: of the moments.
    """
    check("{workdir}" in command, "--command must hold {workdir}, the directory of the run")
    directory.mkdir(parents=True, exist_ok=True)
    calm, killed = directory / "undisturbed", directory / "killed"
    for run in (calm, killed):
        shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    with start(command, calm) as program:
        training = until_it_trains(program, calm)
        check(program.wait() == 0, f"the undisturbed run failed: see {log_of(calm)}")
    end = time.monotonic() - began
    check(training is not None, f"{calm} logged nothing: is it the command's work directory?")
    ready = training - began
    print(f"undisturbed: {end:.1f} s, {ready:.1f} s of them before the first step", flush=True)

    moments = random.Random(seed)
    share = 2.2 * (end - ready) / kills  # of the training, so that some is left for the last kill
    for number in range(1, kills + 1):
        before, began = newest(killed), time.monotonic()
        with start(command, killed) as program:
            if number % 2:
                training = until_it_trains(program, killed)
                ready = training - began if training else ready
                delay = moments.uniform(0, share)
            else:
                delay = moments.uniform(0, ready + share)
            with suppress(subprocess.TimeoutExpired):
                program.wait(delay)
        check(
            program.returncode == -signal.SIGKILL,
            f"the run ended by itself (exit code {program.returncode}) after {number - 1} kills: "
            f"see {log_of(killed)}, or give it more steps",
        )
        after = newest(killed)
        print(f"kill {number}: step {after} is saved", flush=True)
        check(after >= before, f"step {before} was saved, and is gone")
    with start(command, killed) as program:
        check(program.wait() == 0, f"the last run failed: see {log_of(killed)}")

    different = list(differences(calm, killed))
    for line in different:
        print(line)
    if different:
        sys.exit(1)
    print(f"{kills} kills, and the same end: step {newest(killed)}, bit for bit")


@contextmanager
def start(command: str, run: Path) -> Iterator[subprocess.Popen]:
    """The command in a group of processes of its own, which does not outlive the context."""
    with log_of(run).open("a") as log:
        program = subprocess.Popen(
            shlex.split(command.replace("{workdir}", str(run))),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield program
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def log_of(run: Path) -> Path:
    """What a run prints."""
    return run.with_name(f"{run.name}.log")


def until_it_trains(program: subprocess.Popen, run: Path) -> float | None:
    """Waits until the run logs a step; the time of it, or None if it ends before."""
    file = run / "metrics.jsonl"

    def last() -> int:
        return max((row["step"] for row in rows(file)), default=0)

    before, seen = newest(run), file.stat().st_mtime_ns if file.exists() else 0
    while program.poll() is None:
        now = file.stat().st_mtime_ns if file.exists() else 0
        if now != seen and last() > before:
            return time.monotonic()
        time.sleep(POLL)
    return None


def newest(run: Path) -> int:
    """The newest saved step, 0 if there is none."""
    return max((step.number for step in saved_steps(run / CHECKPOINTS)), default=0)


def rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of metrics."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if line]


def differences(calm: Path, killed: Path) -> Iterator[str]:
    """What is not the same in the end, a line each."""
    for path in sorted((killed / CHECKPOINTS).iterdir()):
        if not path.name.isdigit():
            yield f"{path} was left: a step was damaged, or half of one stayed"
    steps = [saved_steps(run / CHECKPOINTS)[0] for run in (calm, killed)]
    numbers = [step.number for step in steps]
    if numbers[0] != numbers[1]:
        yield f"the last step is {numbers[1]}, not {numbers[0]}"
        return
    one, other = steps
    if one.meta["data"] != other.meta["data"]:
        yield f"the position in the data is {other.meta['data']}, not {one.meta['data']}"
    for item in (PARAMS, TRAIN):
        first, second = arrays(one, item), arrays(other, item)
        for name in sorted(first.keys() | second.keys()):
            if name not in first or name not in second:
                yield f"{item}: only one run has {name}"
            elif first[name].tobytes() != second[name].tobytes():
                yield f"{item}: {name} differs"
    logged = [
        [(row["step"], row["loss"]) for row in rows(run / "metrics.jsonl") if "loss" in row]
        for run in (calm, killed)
    ]
    if logged[0] != logged[1]:
        yield "the losses in metrics.jsonl differ"


def arrays(step: SavedStep, item: str) -> dict[str, np.ndarray]:
    """Every array of an item."""
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"])
        for name, array in step.meta["arrays"][item].items()
    }
    return jax.device_get(step.read(item, wanted))


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
