"""Starts two trainers on one run directory at random moments, and counts saved steps that are lost.

    python scripts/proofs/writers.py --directory /tmp/writers
    python scripts/proofs/writers.py --directory /tmp/writers --bucket

Each round starts a trainer, and a second one a random time later. One of them must be refused in
one line with exit code 2, and the other must train. At a random moment that one is stopped by
SIGTERM, in some rounds by kill -9. In other rounds the first trainer is suspended. On a disk it
keeps its lock. In a bucket it loses its lease: the second trainer takes over, and the first must
stop when it wakes up.

All steps that were saved before a round must be there after it. At the end each saved step must be
undamaged, and metrics.jsonl must have every step once. Exit code 1: a step is lost.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import tyro
from fake_bucket import BUCKET, served
from kills import Run, arrays, ends, rows, start, until_it_trains

from lsjax.checkpoints.run import CHECKPOINTS, METRICS
from lsjax.checkpoints.steps import PARAMS, TRAIN, saved_steps
from lsjax.cli.errors import one_line_errors
from lsjax.config import as_path, check
from lsjax.io.files import remove_directory

COMMAND = (
    f"{sys.executable} train.py --config scripts/proofs/tiny_run.py --workdir {{workdir}} "
    "--num-steps 100000 --batch-size 64 --evaluation.every 100000 "
    "--checkpoints.every 5 --checkpoints.keep-last 100000"
)
APART = 12.0  # most seconds between the two starts: the time until a trainer trains
LONGEST = 5.0  # most seconds between a refusal and the end of a round
REFUSED = re.compile(r"^error: .*another trainer \(process \d+ on .*\) (writes|has begun to write)")


def main(
    directory: str,
    starts: int = 20,
    kills: int = 3,
    suspensions: int = 2,
    bucket: bool = False,
    seed: int = 0,
) -> None:
    """Runs the rounds; exits with 1 if a saved step is lost.

    Args:
        directory: directory for the run and the logs of its trainers.
        starts: number of rounds, each with two starts.
        kills: number of rounds that end with kill -9.
        suspensions: number of rounds in which the first trainer is suspended.
        bucket: whether the run is in a bucket, which a server on this machine holds.
        seed: seed of the moments and of the order of the rounds.
    """
    chance = random.Random(seed)
    kinds = ["kill"] * kills + ["suspend"] * suspensions
    kinds += ["term"] * (starts - len(kinds))
    chance.shuffle(kinds)
    with served() if bucket else nullcontext():
        workdir = as_path(f"gs://{BUCKET}" if bucket else directory) / "writers"
        trainers = [Run(workdir, Path(directory) / name) for name in ("first", "second")]
        for trainer in trainers:
            trainer.logs.mkdir(parents=True, exist_ok=True)
        remove_directory(workdir)
        lost = 0
        for number, kind in enumerate(kinds, 1):
            before, began = saved(trainers[0]), time.monotonic()
            said = play(kind, trainers, chance, taken_over=bucket)
            missing = before - saved(trainers[0])
            lost += len(missing)
            took = f"{time.monotonic() - began:.0f} s"
            count = f"{len(saved(trainers[0]))} steps are saved, {len(missing)} lost"
            print(f"{number}. {said}; {count}; {took}", flush=True)
        check_whole(trainers[0])
    print(f"{len(kinds)} rounds: {lost} saved steps were lost")
    sys.exit(int(lost > 0))


def play(kind: str, trainers: list[Run], chance: random.Random, taken_over: bool) -> str:
    """One round; returns what happened. taken_over: whether a suspended trainer is replaced."""
    with start(COMMAND, trainers[0]) as first:
        if kind == "suspend":
            check(until_it_trains(first, trainers[0]) is not None, f"see {trainers[0].log()}")
        apart = chance.uniform(0, APART)
        time.sleep(apart)
        if kind == "suspend":
            os.killpg(first[0].pid, signal.SIGSTOP)
        with start(COMMAND, trainers[1]) as second:
            began = time.monotonic()
            if kind == "suspend" and taken_over:
                check(until_it_trains(second, trainers[1]) is not None, f"see {trainers[1].log()}")
                os.killpg(first[0].pid, signal.SIGCONT)
            refused = first_to_end([*first, *second])
            took = time.monotonic() - began
            if kind == "suspend" and not taken_over:
                os.killpg(first[0].pid, signal.SIGCONT)
            check_refused([*first, *second][refused], trainers[refused])
            trains = first if refused == 1 else second
            check(
                until_it_trains(trains, trainers[1 - refused]) is not None,
                f"both ended: see {trainers[1 - refused].log()}",
            )
            time.sleep(chance.uniform(0, LONGEST))
            number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
            os.killpg(trains[0].pid, number)
            (code,) = ends(trains, 60)
            expected = -number if kind == "kill" else 128 + number
            check(code == expected, f"{code}, not {expected}: see {trainers[1 - refused].log()}")
    names = "first", "second"
    return (
        f"{kind}: started {apart:.1f} s apart, the {names[refused]} one is refused {took:.1f} s "
        "after the second start"
    )


def first_to_end(programs: list[subprocess.Popen], within: float = 180) -> int:
    """Waits until one of the programs ends; returns its number."""
    last = time.monotonic() + within
    while time.monotonic() < last:
        for number, program in enumerate(programs):
            if program.poll() is not None:
                return number
        time.sleep(0.05)
    check(False, f"both trainers train for {within:.0f} s")
    return -1


def check_refused(program: subprocess.Popen, trainer: Run) -> None:
    """Raises ConfigError unless the program ended with code 2 and one line that names the owner."""
    errors = [line for line in trainer.log().read_text().splitlines() if "rror" in line]
    check(
        program.returncode == 2 and len(errors) == 1 and REFUSED.match(errors[0]) is not None,
        f"ended with {program.returncode}: see {trainer.log()}",
    )


def saved(trainer: Run) -> set[int]:
    """Numbers of the saved steps."""
    return {step.number for step in saved_steps(trainer.workdir / CHECKPOINTS)}


def check_whole(trainer: Run) -> None:
    """Raises an error if a saved step is damaged, or if metrics.jsonl lacks a step."""
    steps = saved_steps(trainer.workdir / CHECKPOINTS)
    for step in steps:
        for item in (PARAMS, TRAIN):
            arrays(step, item)
    logged = [row["step"] for row in rows(trainer.workdir / METRICS) if row["kind"] == "step"]
    check(logged == [*range(1, len(logged) + 1)], f"{trainer.workdir / METRICS} lacks a step")
    check(len(logged) >= steps[0].number, f"step {steps[0].number} has no row of metrics")
    print(f"{len(steps)} saved steps are undamaged, {len(logged)} rows of metrics", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
