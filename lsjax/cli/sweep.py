"""Self-speculation at every exit with every draft length: speed, acceptance and prediction, drawn.

    python -m lsjax.cli.sweep --model PATH --prompt-file prompts.jsonl \\
        --exit-layers 2 4 6 8 --num-draft-tokens 2 4 6 8 12 --output sweeps/model

The directory --output gets

    texts.jsonl       each text's time and drafts, as they come; a killed sweep goes on
    sweep.json        a row for each cell and some texts by the best one, for lsjax.cli.report
    sweep.png         heat maps: tokens per second, predicted speedup, acceptance rate
    acceptance.png    acceptance by position in the draft

A larger grid and more repeats go on from the same directory too; anything else is another sweep, as
are other draft lengths with --draft-confidence, for which rounds are verified then.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import fingerprints, named_parameters
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.grid import Grid, GridArguments, show, wide_console
from lsjax.cli.setup import keep_compiled_programs, machine
from lsjax.cli.show import coloured, origins
from lsjax.config import check
from lsjax.decoding.calibration import memory_bandwidth
from lsjax.decoding.engine import Engine
from lsjax.decoding.state import Strategy
from lsjax.evaluation.figures import check_plots
from lsjax.evaluation.results import append, resume
from lsjax.evaluation.speed import Timed, cell_of, compare, take_turns
from lsjax.evaluation.speed_plots import best_row, plot_acceptance, plot_sweep

TEXTS, SUMMARY = "texts.jsonl", "sweep.json"
SAMPLES = 3  # texts of the best cell that are kept


@dataclass(frozen=True, kw_only=True)
class Arguments(GridArguments):
    """Self-speculation at every exit with every draft length."""

    output: Path
    """Directory of the sweep."""
    repeats: int = 1
    """Turns of each cell with each prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        sweep(parse_flags(Arguments, argv, __doc__))
    return 0


def sweep(arguments: Arguments) -> None:
    """Measures what is not measured yet, prints the table, draws the pictures."""
    check(arguments.repeats >= 1, f"--repeats {arguments.repeats} is below 1: choose 1 up")
    check(bool(arguments.exit_layers), "--exit-layers is empty: name exits to draft from")
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    grid = Grid(arguments, notes.print)
    check_plots()
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_output(arguments.output / TEXTS)
    keep_compiled_programs()
    engine = grid.load()
    everything = grid.strategies(engine)
    settings = settings_of(grid, engine)
    wanted = {
        (repeat, number, cell_of(strategy))
        for repeat in range(1, 1 + arguments.repeats)
        for number in range(len(grid.prompts))
        for strategy in everything
    }
    texts = [Timed.read(row) for row in resume(arguments.output / TEXTS, settings)]
    texts = [one for one in texts if (one.repeat, one.prompt, cell_of(one)) in wanted]
    done = {(one.repeat, one.prompt, cell_of(one)) for one in texts}
    if done:
        notes.print(f"{len(done)} of {len(wanted)} texts are there already")
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        if done < wanted:
            warm_up(engine, everything, grid, arguments)
        progress.update(task, description="decoding")
        for one in take_turns(
            engine,
            everything,
            grid.prompts,
            new_tokens=arguments.new_tokens,
            repeats=range(1, 1 + arguments.repeats),
            sampling=grid.sampling,
            done=done,
            advance=partial(progress.advance, task),
        ):
            append(arguments.output / TEXTS, asdict(one))
            texts.append(one)
        progress.update(task, description="timing the parts")
        figures = (grid.costs(engine), memory_bandwidth())
    itemsize = engine.model.dtype.itemsize
    rows = list(compare(grid.config, itemsize, everything, texts, *figures))
    title = f"{grid.title}, {arguments.repeats} repeat{'s' * (arguments.repeats > 1)}"
    show(wide_console(), title, rows)
    best = best_row(rows)
    (strategy,) = (one for one in everything if cell_of(one) == cell_of(best))
    summary = {
        "title": title,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "samples": samples(engine, strategy, grid, arguments.new_tokens),
    }
    file = arguments.output / SUMMARY
    file.write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    plot_sweep(rows, arguments.output / "sweep.png", title=title)
    plot_acceptance(rows, arguments.output / "acceptance.png", title=arguments.model.name)


def settings_of(grid: Grid, engine: Engine) -> dict[str, Any]:
    """What a text's time and drafts depend on, but for its cell."""
    arguments = grid.arguments
    weights = fingerprints(named_parameters(engine.model)[0])
    vocabulary = None if grid.vocabulary is None else grid.vocabulary.ids_N.tolist()
    return {
        "model": _digest(weights),
        "prompts": _digest(grid.prompts),
        "draft_vocab": None if vocabulary is None else f"{len(vocabulary)} {_digest(vocabulary)}",
        **{
            name: getattr(arguments, name)
            for name in (
                "draft_confidence",
                "identity_tail",
                "new_tokens",
                "temperature",
                "capacity",
            )
        },
        "lengths": None if arguments.draft_confidence is None else grid.lengths,
        **{name: getattr(arguments, name) for name in ("separate_programs", "stack_layers")},
        "dtype": grid.dtype,
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def warm_up(
    engine: Engine, everything: Sequence[Strategy], grid: Grid, arguments: Arguments
) -> None:
    """Compiles and runs each program once: prompts of equal sizes of the cache share theirs."""
    programs = {strategy.program: strategy for strategy in everything}
    new_tokens = arguments.new_tokens
    for strategy in programs.values():
        engine.use(strategy)
        sizes = {
            (engine.capacity(len(prompt) + 1), engine.capacity(len(prompt) + new_tokens)): prompt
            for prompt in grid.prompts
        }
        for prompt in sizes.values():
            engine.generate([prompt], max_new_tokens=new_tokens, sampling=grid.sampling)


def samples(
    engine: Engine, strategy: Strategy, grid: Grid, new_tokens: int
) -> list[dict[str, Any]]:
    """Some prompts' texts by a strategy, in pieces with where they came from."""
    engine.use(strategy)
    engine.ignore_end = False
    prompts = grid.prompts[:SAMPLES]
    done = engine.generate(prompts, max_new_tokens=new_tokens, sampling=grid.sampling)
    return [
        {
            "prompt": grid.tokenizer.decode(prompt),
            "pieces": origins(coloured(grid.tokenizer, prompt, completion)),
            "drafted": completion.drafted,
            "accepted": completion.accepted,
        }
        for prompt, completion in zip(prompts, done, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
