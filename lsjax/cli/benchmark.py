"""Strategies side by side on the same prompts: speed, speedup, and how far it is from the limit.

    python -m lsjax.cli.benchmark --model PATH --exit-layers 4 8 --num-draft-tokens 4 8
    python -m lsjax.cli.benchmark --model PATH --identity-tail 2 --exit-layers 2 4 8 15 \\
        --num-draft-tokens 2 4 8 12 --draft-vocab 2048

One process, the strategies in turns after a warm-up, medians over prompts and repeats. The columns
are defined in docs/performance.md. A large grid is for lsjax.cli.sweep, which goes on where it was
killed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.grid import Grid, GridArguments, show, wide_console
from lsjax.cli.setup import keep_compiled_programs
from lsjax.config import check
from lsjax.decoding.cost import memory_bandwidth, weight_bytes
from lsjax.evaluation.speed import compare, take_turns


@dataclass(frozen=True, kw_only=True)
class Arguments(GridArguments):
    """Strategies side by side on the same prompts."""

    repeats: int = 5
    """Turns of each strategy with each prompt, after one to warm up."""
    json: Path | None = None
    """Writes a JSON object a strategy to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        benchmark(parse_flags(Arguments, argv, __doc__))
    return 0


def benchmark(arguments: Arguments) -> None:
    """Measures, prints the table and writes the rows."""
    check(arguments.repeats >= 1, f"--repeats {arguments.repeats} is below 1: choose 1 up")
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    grid = Grid(arguments, notes.print)
    if arguments.json is not None:
        check_output(arguments.json, arguments.prompt_file)
    keep_compiled_programs()
    engine = grid.load()
    config, itemsize = grid.config, engine.model.dtype.itemsize
    with Progress(console=notes, transient=True) as progress:
        everything = grid.strategies(engine)
        turns = 1 + arguments.repeats
        task = progress.add_task("decoding", total=len(everything) * len(grid.prompts) * turns)
        texts = take_turns(
            engine,
            everything,
            grid.prompts,
            new_tokens=arguments.new_tokens,
            repeats=range(turns),
            sampling=grid.sampling,
            advance=partial(progress.advance, task),
        )
        texts = [text for text in texts if text.repeat]  # without the warm-up
        bandwidth = memory_bandwidth()
        progress.update(task, description="timing the parts")
        costs = grid.costs(engine)
    rows = list(compare(config, itemsize, everything, texts, costs, bandwidth))
    console = wide_console()
    show(console, f"{grid.title}, {arguments.repeats} repeats", rows)
    weights = weight_bytes(config, itemsize)
    console.print(
        f"{engine.num_programs} programs, {engine.compile_seconds:.1f} s compiling; autoregressive "
        f"decoding reads {weights / 1e6:.0f} MB of weights a token, "
        f"{rows[0].bandwidth / 1e9:.1f} GB/s, {rows[0].share_of_bandwidth:.0%} of this memory's "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    if costs is not None:
        one = costs.pass_seconds(config.num_layers, 1)
        passes = ", ".join(
            f"{width} at {costs.pass_seconds(config.num_layers, width) / one:.2f}"
            for width in costs.head
        )
        console.print(f"A pass of one position takes {one * 1e3:.1f} ms; times that, {passes}")
    if arguments.json is not None:
        with arguments.json.open("w", encoding="utf-8") as lines:
            for row in rows:
                print(json.dumps(asdict(row)), file=lines)


if __name__ == "__main__":
    sys.exit(main())
