"""Writes docs/configuration.md: every field of a training configuration, from its classes.

    python scripts/document_configuration.py

tests/config/test_documentation.py fails if the page is out of date.
"""

import dataclasses
import inspect
from pathlib import Path

from lsjax.cli.flags.fields import field_texts
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
    texts = field_texts(kind)
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
                texts[field.name].replace("|", "\\|"),
            )
            rows.append(f"| {' | '.join(cells)} |")
    lines = [f"## {path.rstrip('.') or 'The run'}", "", inspect.getdoc(kind), ""]
    header = ["| field | values | default | what |", "|---|---|---|---|"]
    return ["\n".join([*lines, *header, *rows, ""]), *parts]


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    value = field.default
    return f"`{value if value and isinstance(value, str) else repr(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
