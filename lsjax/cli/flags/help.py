"""Help of programs: a screen with the flags that people use, or all flags."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from lsjax.cli.flags.fields import Flag, flags_of

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
WIDTH, INDENT = 100, 32  # columns of a line, and those before the text of a flag
LONG_VALUES = 60  # characters of the choices of a flag that a screen does not show all


def help_text(kind: type, common: Sequence[str] | None, default: Any = None) -> str:
    """The flags of a dataclass. common: fields that are shown, with the first sentence of their
    text; None shows all. default: values of a configuration file."""
    known = {flag.field: flag for flag in flags_of(kind)}
    if default is not None:  # the configuration's own
        known |= {flag.field: flag for flag in flags_of(type(default), default)}
    lines = []
    for field in known if common is None else common:
        lines += _lines(known[field], is_short=common is not None)
    if common is not None:
        lines += columns(HELP_ALL, f"All {len(known)} options.")
    return "\n".join(lines)


def _lines(flag: Flag, is_short: bool) -> list[str]:
    name = flag.names[-1]  # the usual one
    if not is_short:
        name = ", ".join([*flag.names, *[flag.negated] * bool(flag.negated)])
    text = flag.text
    if is_short:
        first, end, _ = text.partition(". ")
        text = first + end.strip()
    value, values = flag.default, flag.values
    if is_short and len(values) > LONG_VALUES:
        values = ",".join(values.split(",")[:3]) + ",...}"
    if value is not None and value is not dataclasses.MISSING and value not in ("", (), False):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text += f" [{shown}]"
    return columns(f"{name} {values}".strip(), text)


def columns(name: str, text: str) -> list[str]:
    """Lines of a name and its text. A long name has lines of its own."""
    first, *rest = textwrap.wrap(text, WIDTH - INDENT) or [""]
    names = textwrap.wrap(name, WIDTH - 2, break_on_hyphens=False, subsequent_indent="  ")
    if len(name) <= INDENT - 4:
        lines = [f"  {name:{INDENT - 2}}{first}".rstrip()]
    else:
        lines = [*(f"  {part}" for part in names), " " * INDENT + first]
    return lines + [" " * INDENT + line for line in rest]
