"""Presses Ctrl-C at random moments in the life of four programs.

    python scripts/proofs/interrupts.py --directory /tmp/interrupts

Each program first runs undisturbed, which gives its length. Then it starts again and again, with
empty caches, so that it also compiles. Its process group gets SIGINT at a random moment, from the
first line of the program on. It must print one line about it and end with exit code 130, with no
traceback and no process left behind. Every second signal comes twice. At last the interrupted
training run must still come to its end.

A program that ends before the signal comes counts as too late. Exit code 1: another one ended in
another way.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tyro

from lsjax.cli.errors import one_line_errors

ROOT = Path(__file__).parents[2]
POLL = 0.002  # seconds between looks at a program
WITHIN = 60.0  # seconds in which a program must end
LINE = re.compile(r"^(\r\x1b\[K)?(interrupted|stopped after step \d+, which is saved)", re.M)
BAD = re.compile(r"Traceback|Exception ignored|Fatal|^error", re.M)
PYTHON = ("env", "--default-signal=INT", sys.executable)
CORPUS = """
from lsjax.config import DataConfig, LlamaConfig, TrainConfig
config = TrainConfig(
    model=LlamaConfig.tiny(), data=DataConfig(tokenizer="bytes", max_documents=400),
    num_steps=1, batch_size=1, seq_len=256,
)
"""


class Drill(NamedTuple):
    """A program, and where its runs are."""

    name: str
    command: tuple[str, ...]  # with {run} for the directory of its output
    directory: Path

    @property
    def run(self) -> Path:
        """The directory of the output."""
        return self.directory / self.name / "run"


class Ended(NamedTuple):
    """How a program ended."""

    code: int | None
    output: str  # both streams
    at: float  # seconds after the start at which the signal came
    took: float  # seconds from then to its end


def main(directory: Path, each: int = 10, seed: int = 0) -> int:
    """Runs the drill; returns 1 if a program ended in another way.

    Args:
        directory: new directory for runs and caches.
        each: number of interrupted runs of each program.
        seed: seed of the moments.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True)
    (directory / "corpus.py").write_text(CORPUS)
    chance, wrong, late, slowest = random.Random(seed), 0, 0, 0.0
    for drill in drills(directory):
        (directory / drill.name).mkdir()
        whole = start(drill, None)
        if whole.code != 0:
            sys.exit(f"{drill.name} failed undisturbed:\n{whole.output}")
        print(f"{drill.name}: {whole.took:.1f} s undisturbed", flush=True)
        length = whole.took
        if drill.name == "train":
            shutil.copytree(drill.run, directory / "model")
        for number in range(1, each + 1):
            if drill.name != "train" or number % 2:  # otherwise the run resumes
                shutil.rmtree(drill.run, ignore_errors=True)
            ended = start(drill, chance.uniform(0, length), twice=number % 2 == 0)
            problems = "; ".join(problems_of(ended))
            if ended.code == 0:  # the machine was slower at first
                length = ended.at
            wrong, late = wrong + bool(problems), late + (ended.code == 0)
            slowest = max(slowest, ended.took)
            said = "too late" if ended.code == 0 else problems or "as it should"
            print(f"  {number}. at {ended.at:.2f} s: {said}, after {ended.took:.2f} s", flush=True)
            if problems:
                print(ended.output, flush=True)
    last = start(drills(directory)[0], None)
    wrong += last.code != 0
    print(f"{4 * each} programs, {late} too late, {wrong} wrong; the slowest took {slowest:.1f} s")
    return int(wrong > 0)


def drills(directory: Path) -> list[Drill]:
    """The programs. Training comes first, as the model is its result."""
    tiny, model = "scripts/proofs/tiny_run.py", str(directory / "model")
    prompts = f"{model}/prompts.jsonl"
    train = ("train.py", "--config", tiny, "--workdir", "{run}", "--num-steps", "60")
    decode = ("decode.py", "--model", model, "--prompt-file", prompts, "--json", "{run}.jsonl")
    decode += ("--strategy", "self_speculative", "--exit-layer", "1", "--num-draft-tokens", "3")
    decode += ("--batch-size", "4", "--max-new-tokens", "100")
    benchmark = ("-m", "lsjax", "benchmark", "--model", model, "--exit-layers", "1", "2")
    benchmark += ("--num-draft-tokens", "3", "--output", "{run}", "--repeats", "8")
    tokenize = ("-m", "lsjax", "tokenize", "--config", str(directory / "corpus.py"))
    commands = {
        "train": train,
        "decode": decode,
        "benchmark": benchmark,
        "tokenize": (*tokenize, "--workers", "2"),
    }
    return [Drill(name, command, directory) for name, command in commands.items()]


def start(drill: Drill, moment: float | None, twice: bool = False) -> Ended:
    """Runs a program with empty caches, and interrupts it after `moment` seconds, if ever."""
    log, caches = drill.directory / "log.txt", drill.directory / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    places = dict(LSJAX_CACHE=str(caches / "lsjax"), JAX_COMPILATION_CACHE_DIR=str(caches / "xla"))
    places |= dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    command = [*PYTHON, *(part.replace("{run}", str(drill.run)) for part in drill.command)]
    began, at = time.monotonic(), 0.0
    with log.open("w") as stream:
        streams = dict(stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
        program = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | places, start_new_session=True, **streams
        )
        if moment is not None:
            while program.poll() is None and (at < moment or not handles(program.pid)):
                time.sleep(POLL)
                at = time.monotonic() - began
            began = time.monotonic()
            press(program.pid)
            if twice:
                time.sleep(0.3)
                press(program.pid)
        with suppress(subprocess.TimeoutExpired):
            program.wait(None if moment is None else WITHIN)
    took = time.monotonic() - began
    left = remaining(program.pid)
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    return Ended(program.returncode, log.read_text() + left, at, took)


def remaining(group: int) -> str:
    """A line if processes of the group go on for seconds."""
    for _ in range(100):
        found = subprocess.run(["pgrep", "-ag", str(group)], capture_output=True, text=True).stdout
        if not found:
            return ""
        time.sleep(0.1)
    return f"error: a process goes on: {found}"


def press(group: int) -> None:
    """Sends SIGINT to a process group, as a terminal does."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGINT)


def handles(process: int) -> bool:
    """Whether the first line of the program has run, after which it also handles SIGTERM."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def problems_of(ended: Ended) -> list[str]:
    """What a program should have done otherwise."""
    lines, found = len(LINE.findall(ended.output)), []
    if BAD.search(ended.output):
        found.append("a traceback or an error")
    if ended.code == 0 and not lines:
        return found
    if ended.code != 130:
        found.append(f"exit code {ended.code}")
    if lines != 1:
        found.append(f"{lines} lines about the interrupt")
    return found


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(tyro.cli(main, description=__doc__))
