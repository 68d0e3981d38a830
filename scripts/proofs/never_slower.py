"""Is `auto` ever slower than autoregressive decoding, from an engine's first call on?

    python scripts/proofs/never_slower.py --model build/m/text --temperatures 0 0.8 \\
        --batch-sizes 1 8

Each repeat takes other prompts and decodes them with both strategies, in turns. `auto` forgets what
earlier calls taught it, so that each call is an engine's first one. Only rounds are timed. Prints a
row of a Markdown table for each setting. The speedup is that of all repeats together, with a 95%
interval by the bootstrap over them. Exits with 1 if a setting is below LEAST, or its interval below
LEAST_LOW.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from lsjax.cli.engines import load_engine, make_strategies, open_model
from lsjax.cli.flags.shared import ModelFlags, StrategyFlags
from lsjax.config import Sampling
from lsjax.decoding.strategy import Autoregressive
from lsjax.evaluation.intervals import from_samples

LEAST, LEAST_LOW = 0.98, 0.95


@dataclass(frozen=True)
class Arguments:
    """What to time."""

    model: Path
    """The model."""
    exit_blocks: Path | None = None
    """Its exit blocks."""
    prompts: Path | None = None
    """A file of JSON lines with the field "prompt"; by default prompts.jsonl of the model's run."""
    temperatures: tuple[float, ...] = (0.0, 0.8)
    """Temperatures."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Rows."""
    new_tokens: int = 96
    """New tokens of each text."""
    repeats: int = 8
    """Calls with each strategy."""


def prompts_of(file: Path) -> list[str]:
    """The prompts of a file, or the first turns of Spec-Bench."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [line["prompt"] if "prompt" in line else line["turns"][0] for line in lines]


def main() -> int:
    """Prints a row for each setting."""
    given = tyro.cli(Arguments, description=__doc__)
    prompts = prompts_of(given.prompts or given.model / "prompts.jsonl")
    good = True
    for rows in given.batch_sizes:
        flags = ModelFlags(model=given.model, exit_blocks=given.exit_blocks, batch_size=rows)
        opened = open_model(flags)
        (auto,) = make_strategies(StrategyFlags(strategies=("auto",)), opened)
        engine = load_engine(opened, Console(stderr=True))
        engine.ignore_end = True
        for temperature in given.temperatures:
            seconds = np.zeros((1 + given.repeats, 2))
            rounds = tokens = 0
            for repeat in range(-1, given.repeats):  # the first one compiles
                begin = max(repeat, 0) * rows
                some = [prompts[(begin + row) % len(prompts)] for row in range(rows)]
                sampling = Sampling(temperature=temperature, seed=1_000 * repeat + 1_000)
                options = dict(sampling=sampling, max_new_tokens=given.new_tokens)
                order = (0, 1) if repeat % 2 else (1, 0)
                for which in order:
                    engine.runtime.lessons.clear()
                    engine.use((Autoregressive(), auto)[which])
                    before = engine.decode_seconds
                    texts = engine.generate(some, **options)
                    seconds[repeat, which] = engine.decode_seconds - before
                    if which and repeat >= 0:
                        rounds += sum(text.rounds for text in texts)
                        tokens += sum(len(text.token_ids) for text in texts)
            base, own = seconds[:-1].T
            found = from_samples(
                lambda base, own, axis: base.sum(axis) / own.sum(axis), base, own, of="repeats"
            )
            good &= found.value >= LEAST and found.low >= LEAST_LOW
            cells = [given.model.name, temperature, rows, found.text("5.3f")]
            cells += [f"{tokens / rounds:.2f}", " ".join(f"{r:.2f}" for r in base / own)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
