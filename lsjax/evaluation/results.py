"""A file of results that a killed program goes on with.

The first line says what was asked, each further line is one answer. A line is written whole, with
its end, when the answer is there; a last line without an end is what a killed program left of one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.config import ConfigError, check
from lsjax.config.json_form import differences

HEADER = "asked"


def resume(file: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers that the file has; a file that is not there begins with its header.

    Cuts off a torn last line. Raises ConfigError where the file answers something else, with what
    differs, and for a line that is none of ours.
    """
    header = _line({HEADER: dict(asked)})
    content = file.read_bytes() if file.exists() else b""
    if b"\n" not in content and header.encode().startswith(content):
        file.write_text(header, encoding="utf-8")
        return []
    whole = content[: content.rfind(b"\n") + 1]
    before, answers = read(file)
    now = json.loads(_line(dict(asked)))
    found = differences(before, now)
    check(
        not found,
        f"{file} holds answers to something else: "
        + ", ".join(
            f"{name} was {_brief(was)} and is now {_brief(is_)}" for name, was, is_ in found
        )
        + "; name another --output, or remove it",
    )
    if len(whole) < len(content):
        with file.open("rb+") as stream:
            stream.truncate(len(whole))
    return answers


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was asked and the answers, without a torn last line.

    Raises ConfigError for what is no file of results.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        check(
            isinstance(row, dict) and (HEADER in row) == (number == 1),
            f"{file}, line {number} is no line of results: name another --output, or remove it",
        )
        rows.append(row)
    if not rows:
        raise ConfigError(f"{file} holds no results: name another --output, or remove it")
    return rows[0][HEADER], rows[1:]


def append(file: Path, answer: Mapping[str, Any]) -> None:
    """Adds an answer."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_line(answer))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
