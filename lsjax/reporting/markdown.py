"""Tables in Markdown."""

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table, whose first row is its heading; none without rows."""
    lines = [f"| {' | '.join(map(in_cell, cells))} |" for cells in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]] if lines else []


def in_cell(value: Any) -> str:
    """A value in a cell, which ends at a | or a line break."""
    return str(value).replace("\n", "\\n").replace("|", "\\|")
