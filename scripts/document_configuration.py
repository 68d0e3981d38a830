"""Writes docs/configuration.md: every field of a training configuration, from its classes.

    python scripts/document_configuration.py

tests/config/test_documentation.py fails if the page is out of date.
"""

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path

from lsjax.config import LlamaConfig, TrainConfig
from lsjax.config.checked import described

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

A file in configs/ is Python that sets `config` to a `lsjax.config.TrainConfig`. Each field is also
a train.py flag: join names with dots, and replace underscores by hyphens. So `early_exit.e_scale`
is `--early-exit.e-scale`. Flags win over the file. Each run saves its configuration in config.json.
An invalid value stops the program before compilation, with a one-line error.
(`python scripts/document_configuration.py` writes this page.)
"""


def page() -> str:
    """A table for each class: the fields of TrainConfig, then those of its parts."""
    return "\n".join([INTRODUCTION, *_tables(TrainConfig, "")]) + "\n"


def _tables(kind: type, path: str) -> list[str]:
    rows, parts = [], []
    texts = _texts(kind)
    for field in dataclasses.fields(kind):
        part = LlamaConfig if field.name == "model" else field.type
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(part):
            parts += _tables(part, f"{name}.")
        else:
            values = described(field.type, field.metadata.get("bounds"))
            cells = (
                f"`{name}`",
                values,
                _default(field),
                " ".join(texts[field.name].split()).replace("|", "\\|"),
            )
            rows.append(f"| {' | '.join(cells)} |")
    lines = [f"## {path.rstrip('.') or 'The run'}", "", inspect.getdoc(kind), ""]
    header = ["| field | values | default | what |", "|---|---|---|---|"]
    return ["\n".join([*lines, *header, *rows, ""]), *parts]


def _texts(kind: type) -> dict[str, str]:
    """The docstring below each field, from the source of the class and its bases."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = ast.literal_eval(text.value)
    return found


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    value = field.default
    return f"`{value if value and isinstance(value, str) else repr(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
