"""Reads a program's flags: what is wrong with them is one line, and not tyro's box."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any, TypeVar

import tyro

from lsjax.config import ConfigError

T = TypeVar("T")


def parse_flags(kind: type[T], argv: Sequence[str] | None, description: str, **settings: Any) -> T:
    """`tyro.cli`: the fields of the dataclass `kind` as flags.

    Raises ConfigError with one line for a flag that there is not, for a value of another type, and
    for what the dataclasses refuse.
    """
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(kind, args=argv, description=description, **settings)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        own = (error for error in _causes(end) if isinstance(error, ConfigError))
        raise next(own, ConfigError(_in_a_line(shown.getvalue()))) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _in_a_line(box: str) -> str:
    """What stands in tyro's box, drawn or in ASCII, coloured or not, below its title."""
    _title, *lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines() or [""]
    sections = [""]
    for line in lines:
        row = line.strip(" │╰╯")
        if row.strip("─-"):
            sections[-1] += f" {row}"
        else:
            sections.append("")  # after a rule
    said = [
        " ".join(part.split()).removesuffix(".")
        for part in sections
        if part and "full helptext" not in part
    ]
    return "; ".join((*said, "--help lists all flags"))
