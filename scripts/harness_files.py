"""Makes the files that the tasks of docs/tasks ask, in the directory in which it runs.

    python scripts/harness_files.py topv2 wikitext2/valid.txt

topv2: the directory of the Hinglish-TOP dataset's train.tsv and test.tsv (docs/results.md). The
text is WikiText-2's validation file. Requests are shuffled; the first one of each domain in
train.tsv is an example.
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lsjax.cli.setup import one_line_errors
from lsjax.config import check
from lsjax.evaluation.examples import file_rows

ARTICLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)  # its title; parts have more signs


def requests(file: Path) -> list[dict[str, str]]:
    """The English side of the rows."""
    rows = (row for _, _, row in file_rows([str(file)]))
    return [
        {"text": row["en_query"], "parse": row["en_parse"], "label": row["domain"]} for row in rows
    ]


def articles(file: Path) -> list[str]:
    """The text, parted before each title."""
    text = file.read_text(encoding="utf-8")
    starts = [found.start() for found in ARTICLE.finditer(text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    """An object a line."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str]) -> None:
    """Writes the three files."""
    check(len(argv) == 2, "name two things: TOPv2's directory and WikiText-2's file")
    topv2, text = map(Path, argv)
    first: dict[str, dict[str, str]] = {}
    for row in requests(topv2 / "train.tsv"):
        first.setdefault(row["label"], row)
    asked = requests(topv2 / "test.tsv")
    random.Random(0).shuffle(asked)
    write("requests_train.jsonl", [first[label] for label in sorted(first)])
    write("requests_test.jsonl", asked)
    write("texts.jsonl", [{"text": article} for article in articles(text)])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
