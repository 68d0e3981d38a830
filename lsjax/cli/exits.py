"""Loss and agreement of every exit of one or several models, on the held-out data of the first,
which is a training run.

    python -m lsjax.cli.exits --runs runs/quickstart runs/plain --output exits.png
    python -m lsjax.cli.exits --runs runs/smollm2 models/smollm2 --output exits.png

The second compares a run with the model that it began from. One table, a row for each of some
exits; a picture with a line for each model (the paper's Figures 6 and 8).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lsjax.checkpoints import assemble, is_run, open_checkpoint, read_run_config
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.setup import cache_directory, choose_dtype, keep_compiled_programs
from lsjax.config import check
from lsjax.data.pipeline import one_pass
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.evaluation.exits import AGREEMENT, ExitScores, exits_to_show, score_exits
from lsjax.evaluation.figures import check_plots
from lsjax.evaluation.plots import plot_exits
from lsjax.model.llama import stacked


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Loss and agreement of every exit of training runs and models."""

    runs: tuple[Path, ...]
    """A training run, and what to set beside it: other runs or models with its tokenizer."""
    batches: int = 64
    """Batches of held-out rows, of the first run's size."""
    output: Path | None = None
    """A picture to draw (.png)."""
    json: Path | None = None
    """Writes a JSON object a run to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        compare(parse_flags(Arguments, argv, __doc__))
    return 0


def compare(arguments: Arguments) -> None:
    """Scores the runs, prints the table, draws the picture."""
    check(arguments.batches >= 1, f"--batches {arguments.batches} is below 1: choose 1 up")
    check(len(arguments.runs) >= 1, "--runs is empty: name the directory of a run")
    first = arguments.runs[0]
    check(is_run(first), f"{first} is no training run: name the --workdir of train.py first")
    names = [run.name for run in arguments.runs]
    check(len(set(names)) == len(names), f"runs of one name ({names}) would be one line: rename")
    tokenizer = load_tokenizer(first).fitted(open_checkpoint(first).config.vocab_size)
    for run in arguments.runs[1:]:
        check(
            load_tokenizer(run).fingerprint == tokenizer.fingerprint,
            f"{run} has another tokenizer than {first}: their losses can't be compared",
        )
    if arguments.output is not None:
        check(
            arguments.output.suffix == ".png",
            f"--output {arguments.output} is no picture that can be drawn: name a .png",
        )
        check_plots()
    for file in (arguments.output, arguments.json):
        if file is not None:
            check_output(file)
    sources = [open_checkpoint(run) for run in arguments.runs]
    config = read_run_config(first)
    keep_compiled_programs()
    batches = list(
        one_pass(
            config.data,
            tokenizer,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            split="validation",
            cache=cache_directory(),
            max_batches=arguments.batches,
        )
    )
    dtype = choose_dtype("auto")
    scores: dict[str, ExitScores] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, source in zip(names, sources, strict=True):
            model = stacked(assemble(source, dtype=dtype))
            tracked = progress.track(batches, description=name)
            scores[name] = score_exits(model, tracked, micro_batches=config.micro_batches)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has room for the table
    console.print(table(scores))
    console.print(AGREEMENT, style="dim")
    if arguments.json is not None:
        with arguments.json.open("w", encoding="utf-8") as lines:
            for name, score in scores.items():
                print(json.dumps({"run": name, **score.to_json()}), file=lines)
    if arguments.output is not None:
        plot_exits(scores, arguments.output)


def table(scores: Mapping[str, ExitScores]) -> Table:
    """Loss and agreement at the first exit and at each eighth of the layers."""
    tokens = next(iter(scores.values())).tokens
    shown = Table(title=f"{tokens:,} held-out tokens", title_justify="left", box=None)
    shown.add_column("exit", justify="right")
    for name in scores:
        shown.add_column(f"{name}: loss", justify="right")
        shown.add_column("agreement", justify="right")
    layers = max(len(score.loss_E) for score in scores.values())
    for exit_layer in exits_to_show(layers):
        cells = (cell for score in scores.values() for cell in score.cells(exit_layer))
        shown.add_row(str(exit_layer), *cells)
    return shown


if __name__ == "__main__":
    sys.exit(main())
