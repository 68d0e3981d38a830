"""Kills a program that tokenizes at random moments, and compares its store with a whole one.

    python scripts/proofs/token_kills.py --directory build/token_kills --tokenizer models/smollm2

The text is the standard library's source. Each kill is a SIGKILL of the first process; the other
processes end with it. Exit code 1: the stores differ. With --bucket the killed store is in a bucket
of a server on this machine (fake_bucket.py).
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import tyro
from fake_bucket import BUCKET, served

from lsjax.config import AnyPath, as_path
from lsjax.config.paths import find_files

CONFIG = """
from lsjax.config import DataConfig, LlamaConfig, TrainConfig
config = TrainConfig(
    model=LlamaConfig.smollm2_135m(), data=DataConfig(tokenizer={tokenizer!r}),
    num_steps=1, batch_size=1, seq_len=2048,
)
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Kills a program that tokenizes."""

    directory: Path
    """New folder for both stores."""
    tokenizer: Path
    """Tokenizer with at most 49,152 tokens."""
    kills: int = 10
    """Number of kills."""
    seed: int = 0
    """Seed of the moments."""
    bucket: bool = False
    """Puts the killed store into a bucket."""


def main(arguments: Arguments) -> int:
    """Runs both programs. Returns 1 if their files differ."""
    arguments.directory.mkdir(parents=True)
    with served() if arguments.bucket else nullcontext():
        there = as_path(f"gs://{BUCKET}" if arguments.bucket else arguments.directory)
        return drill(arguments, there / "killed")


def drill(arguments: Arguments, killed: AnyPath) -> int:
    """The same. killed: directory of the killed store."""
    whole = as_path(arguments.directory / "whole")
    config = arguments.directory / "config.py"
    config.write_text(CONFIG.format(tokenizer=str(arguments.tokenizer.resolve())))
    command = [sys.executable, "-m", "lsjax", "tokenize", "--config", str(config)]

    def environment(store: AnyPath) -> dict[str, str]:
        return {**os.environ, "LSJAX_CACHE": str(store)}

    def made(store: AnyPath) -> int:
        return sum(fnmatch(file.name, "[0-9]*.json") for file in files_of(store))

    subprocess.run(command, env=environment(whole), check=True)
    draw = random.Random(arguments.seed)
    for kill in range(arguments.kills):
        process = subprocess.Popen(command, env=environment(killed), stderr=subprocess.DEVNULL)
        # At a moment after which some shards are left for the next program.
        while made(killed) < kill * made(whole) // (arguments.kills + 1):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill + 1}: {made(killed)} of {made(whole)} shards", flush=True)
    subprocess.run(command, env=environment(killed), check=True)
    contents = [
        {str(file.relative_to(store)): file.read_bytes() for file in files_of(store)}
        for store in (whole, killed)
    ]
    same = contents[0] == contents[1]
    print(f"{len(contents[0])} files, {'equal' if same else 'DIFFERENT'} bit for bit")
    return int(not same)


def files_of(store: AnyPath) -> list[AnyPath]:
    """Files of a store, without those that a killed program has begun."""
    files = find_files([f"{store}/**/*"]) if store.is_dir() else []
    return [file for file in files if ".partial" not in str(file)]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
