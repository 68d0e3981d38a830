"""Kills a training run repeatedly, and compares its result with that of an undisturbed run.

    python scripts/proofs/kills.py --directory /tmp/drill --command \\
        "python train.py --config configs/quickstart.py --workdir {workdir} --num-steps 1000 \\
         --checkpoints.every 5 --model.num-layers 4 --model.hidden-size 64"

The command runs to its end in DIRECTORY/undisturbed. Then it runs in DIRECTORY/killed, gets kill -9
at a random moment, and is restarted. Every second run is killed only once it trains. After the last
kill it may end too. Parameters, optimizer state, counters, the position in the data and the logged
losses must then be equal, bit for bit. No saved step may be damaged. No restart may resume before
the newest saved step. The split of the second run's wall time must add up to it, within 2% or 3 s.

With --processes 2 the command is started twice, as two hosts of one run. A random one is killed;
the other must end by itself, --within a minute and with a message. --terms also sends SIGTERM to a
random process once it trains. All must then end, with the step saved that they report.

With --bucket gs://... the second run is there. The command may name files below {parent}, the
run's parent directory: they must be both in DIRECTORY and in the bucket (scripts/proofs/cloud.py).
"""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from lsjax.checkpoints.run import CHECKPOINTS, METRICS
from lsjax.checkpoints.steps import PARAMS, TRAIN, SavedStep, saved_steps
from lsjax.cli.errors import one_line_errors
from lsjax.config import AnyPath, as_path, check, in_bucket
from lsjax.io.files import remove_directory
from lsjax.training.metrics import TIME, USES

POLL = 0.02  # seconds between looks at the run
BESIDE = 3.0  # seconds of a short run in which Python starts and ends
# What a process says that ends because another one has; the second one is of jax itself.
MESSAGE = re.compile("another process ended|another task died|could not connect")


def main(
    command: str,
    directory: str,
    bucket: str = "",
    kills: int = 20,
    terms: int = 0,
    processes: int = 1,
    within: float = 60,
    seed: int = 0,
) -> None:
    """Runs the drill; exits with 1 if the two runs differ.

    Args:
        command: the training command, with {workdir} for its directory.
        directory: directory for the two runs and their logs; older runs in it are deleted.
        bucket: directory in a bucket for the second run.
        kills: number of times to kill the second run.
        terms: number of times to stop it by SIGTERM, after that.
        processes: number of processes of the run.
        within: seconds in which all must end after one was killed or stopped.
        seed: seed of the moments and of the choice of processes.
    """
    check("{workdir}" in command, "--command must contain {workdir}, the directory of the run")
    as_path(directory).mkdir(parents=True, exist_ok=True)
    calm = Run(as_path(directory) / "undisturbed", as_path(directory))
    killed = Run(as_path(bucket or directory) / "killed", calm.logs)
    for run in (calm, killed):
        remove_directory(run.workdir)
    began = time.monotonic()
    with start(command, calm, processes) as programs:
        training = until_it_trains(programs, calm)
        check(not any(ends(programs)), f"the undisturbed run failed: see {calm.log()}")
    end = time.monotonic() - began
    check(training is not None, f"{calm.workdir} logged nothing: pass {{workdir}} to --workdir")
    ready = training - began
    print(f"undisturbed: {end:.1f} s, of which {ready:.1f} s before the first step", flush=True)

    chance = random.Random(seed)
    stops = kills + terms
    # Seconds of training per kill. On average half of them pass, so some are left for the last run.
    share = 1.4 * (end - ready) / stops
    slowest, first = 0.0, time.monotonic()
    for number in range(1, stops + 1):
        before, began, trains = newest(killed), time.monotonic(), False
        kind = signal.SIGKILL if number <= kills else signal.SIGTERM
        with start(command, killed, processes) as programs:
            if number % 2 or kind == signal.SIGTERM:
                training = until_it_trains(programs, killed)
                trains = training is not None
                ready = training - began if trains else ready
                delay = chance.uniform(0, share)
            else:
                delay = chance.uniform(0, ready + share)
            time.sleep(delay)
            victim = chance.randrange(processes)
            check(
                all(program.poll() is None for program in programs),
                f"the run ended by itself after {number - 1} stops: see {killed.log()}, or raise "
                "its number of steps",
            )
            os.killpg(programs[victim].pid, kind)
            began = time.monotonic()
            codes, took = ends(programs, within), time.monotonic() - began
            slowest = max(slowest, took)
        after = newest(killed)
        said = f"{kind.name} to process {victim}: all ended after {took:.1f} s with {codes}"
        print(f"{number}. {said}; step {after} is saved", flush=True)
        check(after >= before, f"step {before} was saved, but is missing now")
        check_resumes(killed, before, trains)
        for other, code in enumerate(codes):
            log = killed.log(other)
            if kind == signal.SIGTERM:
                check(code == 128 + kind, f"process {other} ended with {code}: see {log}")
            elif other != victim:
                check(code not in (0, None), f"process {other} did not end by itself: see {log}")
                check(MESSAGE.search(log.read_text()) is not None, f"{log} gives no reason")
        if kind == signal.SIGTERM:
            step = re.findall(r"stopped after step (\d+)", killed.log().read_text())[-1]
            check(after == int(step), f"step {after} is saved, not step {step}")
    before = newest(killed)
    with start(command, killed, processes) as programs:
        check(not any(ends(programs)), f"the last run failed: see {killed.log()}")
    print(split(killed, time.monotonic() - first))
    check_resumes(killed, before, trains=True)

    different = list(differences(calm, killed))
    for line in different:
        print(line)
    if different:
        sys.exit(1)
    print(f"{kills} kills and {terms} stops, all ended within {slowest:.1f} s", end="; ")
    print(f"and the same result: step {newest(killed)}, bit for bit")


class Run(NamedTuple):
    """Directory of a run, and the local directory of its processes' logs."""

    workdir: AnyPath
    logs: AnyPath

    def log(self, process: int = 0) -> AnyPath:
        """Log file of a process."""
        return self.logs / f"{self.workdir.name}{f'.{process}' if process else ''}.log"


@contextmanager
def start(command: str, run: Run, processes: int = 1) -> Iterator[list[subprocess.Popen]]:
    """Starts each process of the command in its own group; kills the groups on exit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = []
    try:
        for number in range(processes):
            hosts = (
                f" --distributed.coordinator 127.0.0.1:{port}"
                f" --distributed.num-processes {processes} --distributed.process-id {number}"
            )
            asked = command.replace("{workdir}", str(run.workdir))
            asked = asked.replace("{parent}", str(run.workdir.parent)) + hosts * (processes > 1)
            with run.log(number).open("w") as log:
                program = subprocess.Popen(
                    shlex.split(asked), stdout=log, stderr=log, start_new_session=True
                )
            programs.append(program)
        yield programs
    finally:
        for program in programs:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def ends(programs: list[subprocess.Popen], within: float | None = None) -> list[int | None]:
    """Exit codes of the programs; None for those that have not ended `within` seconds."""
    last = None if within is None else time.monotonic() + within
    for program in programs:
        with suppress(subprocess.TimeoutExpired):
            program.wait(None if last is None else max(0, last - time.monotonic()))
    return [program.returncode for program in programs]


def until_it_trains(programs: list[subprocess.Popen], run: Run) -> float | None:
    """Waits until the run logs a new step; returns the time, or None if the run ends before."""
    file = run.workdir / METRICS

    def last() -> int:
        return max((row["step"] for row in rows(file)), default=0)

    before, seen = newest(run), file.stat().st_mtime_ns if file.exists() else 0
    while programs[0].poll() is None:
        now = file.stat().st_mtime_ns if file.exists() else 0
        if now != seen and last() > before:
            return time.monotonic()
        time.sleep(10 * POLL if in_bucket(file) else POLL)
    return None


def check_resumes(run: Run, before: int, trains: bool) -> None:
    """Raises ConfigError if the last run did not resume after step `before`.

    trains: whether it reached training; otherwise the kill may precede the message.
    """
    said = re.search(r"resumes after step (\d+)\n", run.log().read_text())
    step = int(said[1]) if said else 0
    check(
        step == before or not (said or trains),
        f"step {before} was saved, but the run resumed after step {step}: see {run.log()}",
    )


def split(run: Run, seconds: float) -> str:
    """A run's split of its wall time. Raises ConfigError if it does not add up to `seconds`."""
    *_, last = (row for row in rows(run.workdir / METRICS) if row["kind"] == TIME)
    added = sum(last[use] for use in USES)
    uses = ", ".join(f"{use} {last[use]:.1f}" for use in USES)
    said = f"{seconds:.1f} s of wall time, {added:.1f} s ({added / seconds:.1%}) by use: {uses}"
    check(abs(added - seconds) < max(0.02 * seconds, BESIDE), said)
    return said


def newest(run: Run) -> int:
    """Returns the newest saved step, or 0 without any."""
    return max((step.number for step in saved_steps(run.workdir / CHECKPOINTS)), default=0)


def rows(file: AnyPath) -> list[dict[str, Any]]:
    """The complete lines of a metrics file."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if line]


def differences(calm: Run, killed: Run) -> Iterator[str]:
    """Differences between the results, one line each."""
    whole = {step.directory.name for step in saved_steps(killed.workdir / CHECKPOINTS)}
    for path in sorted((killed.workdir / CHECKPOINTS).iterdir()):
        if path.name not in whole:
            yield f"{path} remains: a step was damaged or incomplete"
    steps = [saved_steps(run.workdir / CHECKPOINTS)[0] for run in (calm, killed)]
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
        [(row["step"], row["loss"]) for row in rows(run.workdir / METRICS) if "loss" in row]
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
