"""Whether the scores in two files of lsjax.cli.evaluate differ by more than chance.

    python -m lsjax.cli.compare plain.jsonl layerskip.jsonl

Each strategy of the second file against one of the first, on the examples that both have: the
difference, its 95% interval (paired bootstrap), and the speedup. The two may be one file.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.config import check
from lsjax.evaluation.bootstrap import compare
from lsjax.evaluation.results import read
from lsjax.evaluation.summary import figures, scores_by_example


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Scores of two files of results, compared."""

    files: tyro.conf.Positional[tuple[Path, Path]]
    """Two files of results for the same rows (.jsonl)."""
    baseline: str = "autoregressive"
    """The strategy of the first file, in its own words, that the second's are compared with."""
    scores: tuple[str, ...] = ()
    """Scores to compare; those that both files have by default."""
    unseen: bool = False
    """Only examples that training has not seen (--without-seen of lsjax.cli.evaluate)."""
    seed: int = 0
    """Of the bootstrap's draws."""
    json: Path | None = None
    """Writes a JSON object a comparison to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        show_comparisons(parse_flags(Arguments, argv, __doc__))
    return 0


def show_comparisons(arguments: Arguments) -> None:
    """Compares, prints the table and writes the rows."""
    (asked, first), (_, second) = map(read_answers, arguments.files)
    if arguments.unseen:
        first, second = ([one for one in part if not one["seen"]] for part in (first, second))
    for file, part in zip(arguments.files, (first, second), strict=True):
        check(bool(part), f"{file} has no answers to compare")
    names = [list(dict.fromkeys(one["strategy"] for one in part)) for part in (first, second)]
    check(
        arguments.baseline in names[0],
        f"--baseline {arguments.baseline!r} is no strategy of {arguments.files[0]}: choose one of "
        f"{'; '.join(names[0])}",
    )
    if arguments.json is not None:
        check_output(arguments.json)
    base = [one for one in first if one["strategy"] == arguments.baseline]
    rows = []
    for name in names[1]:
        if arguments.files[0] == arguments.files[1] and name == arguments.baseline:
            continue
        own = [one for one in second if one["strategy"] == name]
        rows += comparisons(base, own, name, arguments)
    title = f"{asked['task']}: {' against '.join(str(file) for file in reversed(arguments.files))}"
    show(f"{title}, {arguments.baseline}", rows)
    if arguments.json is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        arguments.json.write_text(lines, encoding="utf-8")


def read_answers(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was asked and the answers. Raises ConfigError for what lsjax.cli.evaluate did not
    write."""
    asked, answers = read(file)
    check(
        "task" in asked,
        f"{file} holds no answers to a task: name what lsjax.cli.evaluate wrote (--output)",
    )
    return asked, answers


def comparisons(
    base: Sequence[dict[str, Any]],
    own: Sequence[dict[str, Any]],
    name: str,
    arguments: Arguments,
) -> list[dict[str, Any]]:
    """One for each score, with the ratio of the times of a token on the same examples."""
    both = {one["id"] for one in base} & {one["id"] for one in own}
    check(bool(both), f"no example of {name} is in {arguments.files[0]}: compare one task's rows")
    ms, base_ms = (
        figures([one for one in part if one["id"] in both])["ms_per_token"] for part in (own, base)
    )
    in_base = scores_by_example(base)
    in_both = [score for score in scores_by_example(own) if score in in_base]
    check(
        bool(arguments.scores or in_both),
        f"{name} and {arguments.baseline} have no score in common: compare answers to one task",
    )
    return [
        {
            "strategy": name,
            "score": score,
            **asdict(found := compare(base, own, score, arguments.seed)),
            "difference": found.difference,
            "speedup": base_ms / ms if ms and base_ms else None,
        }
        for score in arguments.scores or in_both
    ]


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The comparisons as a table."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a file has room for the table
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in ("strategy", "score"):
        table.add_column(name)
    for name in ("n", "baseline", "its own", "difference", "95% interval", "speedup"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["strategy"],
            row["score"],
            str(row["examples"]),
            *(f"{row[name]:.4f}" for name in ("first", "second")),
            f"{row['difference']:+.4f}",
            f"{row['low']:+.4f} to {row['high']:+.4f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
