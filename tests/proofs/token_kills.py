"""Kills a program that tokenizes at random moments, and compares its store with a whole one.

    python tests/proofs/token_kills.py --directory build/token_kills --tokenizer models/smollm2

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
from pathlib import Path

import tyro
from fake_bucket import BUCKET, served

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
    with served(arguments.directory) if arguments.bucket else nullcontext():
        return drill(arguments, f"{BUCKET}/killed" if arguments.bucket else "killed")


def drill(arguments: Arguments, killed: str) -> int:
    """The same, with the killed store's folder in the directory."""
    config = arguments.directory / "config.py"
    config.write_text(CONFIG.format(tokenizer=str(arguments.tokenizer.resolve())))
    command = [sys.executable, "-m", "lsjax.cli.tokenize", "--config", str(config)]

    def environment(name: str) -> dict[str, str]:
        place = "gs:/" if name.startswith(BUCKET) else arguments.directory
        return {**os.environ, "LSJAX_CACHE": f"{place}/{name}"}

    def made(name: str) -> int:
        return len(list((arguments.directory / name).rglob("[0-9]*.json")))

    subprocess.run(command, env=environment("whole"), check=True)
    draw = random.Random(arguments.seed)
    for kill in range(arguments.kills):
        process = subprocess.Popen(command, env=environment(killed), stderr=subprocess.DEVNULL)
        # At a moment after which some shards are left for the next program.
        while made(killed) < kill * made("whole") // (arguments.kills + 1):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill + 1}: {made(killed)} of {made('whole')} shards", flush=True)
    subprocess.run(command, env=environment(killed), check=True)
    files = {
        name: {
            file.relative_to(arguments.directory / name): file.read_bytes()
            for file in (arguments.directory / name).rglob("*")
            if file.is_file() and not file.name.startswith(".partial")
        }
        for name in ("whole", killed)
    }
    same = files["whole"] == files[killed]
    print(f"{len(files['whole'])} files, {'equal' if same else 'DIFFERENT'} bit for bit")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
