"""The summary of an evaluation as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each strategy and group of examples (summary.py)."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # a file has room for the table
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in ("strategy", "examples of"):
        table.add_column(name)
    names = [part for name in scores for part in (name, "±")]
    speed = ("tokens/s", "ms/token", "speedup", "accepted", "tokens/round", "ideal", "share")
    for name in ("n", *names, *speed):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        cells = []
        for name in scores:
            score = row["scores"].get(name, {"mean": None, "stderr": None})
            cells += [_or_dash(score["mean"], ".4g"), _or_dash(score["stderr"], ".2g")]
        table.add_row(
            "" if row["strategy"] == before else row["strategy"],
            row["group"],
            str(row["examples"]),
            *cells,
            _or_dash(row["tokens_per_second"], ".1f"),
            _or_dash(row["ms_per_token"], ".2f"),
            _or_dash(row["speedup"], ".2f"),
            _or_dash(row["acceptance_rate"], ".3f"),
            _or_dash(row["tokens_per_round"], ".2f"),
            _or_dash(row["ideal"], ".2f"),
            _or_dash(row["share_of_ideal"], ".2f"),
        )
        before = row["strategy"]
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
