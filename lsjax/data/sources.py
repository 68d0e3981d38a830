"""The source of a configuration, rows of files, and the templates that make documents of rows."""

import csv
import json
import numbers
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.documents import (
    Document,
    Source,
    find_files,
    python_source,
    read_lines,
    stop_at,
    text_files,
)

Fields = Mapping[str, Any]
Refuse = Callable[[ConfigError], None]


def document_source(config: DataConfig, *, validation: bool = False) -> Source:
    """The source of a configuration.

    validation: opens the validation set of its own, if the config has one.

    Raises ConfigError where files are missing.
    """
    paths = config.validation_paths if validation else config.paths
    match config.source:
        case "python_source":
            return python_source()
        case "text":
            return text_files(paths, config.separator)
        case "jsonl" | "tsv":
            name, files, part = " ".join(paths), find_files(paths), ""
            rows = partial(_rows_of_files, files, config.source)
        case "tfds":
            # Only here: its import takes a second.
            from lsjax.data.tfds_rows import TfdsRows

            part = config.validation_split if validation else config.tfds_split
            data_set = TfdsRows(config.tfds_name, part, config.tfds_data_dir)
            name, files, rows = data_set.name, data_set.files, data_set.rows
    return Source(
        name, files, lambda: (row_document(row, config, where) for where, row in rows()), part
    )


def _rows_of_files(files: Sequence[Path], kind: str) -> Iterator[tuple[str, Fields]]:
    reader = json_rows if kind == "jsonl" else tab_separated_rows
    return ((f"{file}, line {line}", row) for file in files for line, row in reader(file))


def training_documents(config: DataConfig) -> Iterator[Document]:
    """The documents that are not held out, without those beyond config.max_documents."""
    documents = islice(document_source(config).documents(), config.max_documents)
    fraction = config.held_out_fraction
    return (document for document in documents if not is_held_out(document.key, fraction))


def is_held_out(key: int | np.ndarray, fraction: float) -> bool | np.ndarray:
    """Whether documents with these keys are in the share that is kept for validation.

    The choice depends neither on the order of the documents nor on their number, and equal
    documents are on the same side.
    """
    return key < int(fraction * 2**64)


def json_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Line numbers and objects; blank lines are skipped.

    Raises ConfigError with file and line, or hands it to `refuse` and leaves the line out.
    """
    for number, line in read_lines(file, refuse):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"is not JSON ({getattr(error, 'msg', error)}): mend it"
            refuse(ConfigError(f"{file}, line {number} {problem}"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(ConfigError(f"{file}, line {number} is no object: write {{...}}"))


def tab_separated_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Line numbers and columns by the names in the header; quotes are plain characters.

    Raises ConfigError with file and line, or hands it to `refuse` and leaves the line out.
    """
    lines = ((n, line.removesuffix("\n").split("\t")) for n, line in read_lines(file, refuse))
    yield from _named_columns(file, lines, refuse)


def comma_separated_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Rows of a .csv file like those of a .tsv; quoted columns may hold commas and line ends."""
    begin = 1

    def lines() -> Iterator[tuple[int, list[str]]]:
        nonlocal begin
        reader = csv.reader(line for _, line in read_lines(file, refuse))
        for columns in reader:
            yield begin, columns
            begin = reader.line_num + 1

    try:
        yield from _named_columns(file, lines(), refuse)
    except csv.Error as error:  # a column of more than 128 KB, say: where the next begins is unsure
        raise ConfigError(f"{file}, line {begin} is not CSV ({error}): mend it") from None


def _named_columns(
    file: Path, lines: Iterator[tuple[int, list[str]]], refuse: Refuse
) -> Iterator[tuple[int, Fields]]:
    rows = ((number, columns) for number, columns in lines if "".join(columns).strip())
    _, names = next(rows, (0, []))
    for number, columns in rows:
        if len(columns) == len(names):
            yield number, dict(zip(names, columns, strict=True))
        else:
            counts = f"{len(columns)} columns, the header {len(names)}"
            refuse(ConfigError(f"{file}, line {number} has {counts}: a tab or a line too many?"))


def row_document(row: Fields, config: DataConfig, where: str) -> Document:
    """The document that the templates make of a row.

    Raises ConfigError, beginning with `where`, for a field that the row lacks, that is no text or
    number, or that holds half a character.
    """
    if config.has_prompts:
        prompt = fill(config.prompt_template, row, where)
        check(prompt.strip() != "", f"{where} has an empty prompt: remove the row")
        return Document(fill(config.response_template, row, where), prompt)
    return Document(fill(config.text_template, row, where))


def fill(template: str, row: Fields, where: str) -> str:
    """The template with each {field} replaced by what the row has under that name."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        check(
            field in row,
            f"{where} has no field {field!r}, it has {', '.join(map(str, row))}: change "
            "the template",
        )
        value = row[field]
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        good = isinstance(value, str | numbers.Real) and not isinstance(value, bool)
        check(good, f"{where}: {field} is {value!r:.40}, but must be a text or a number")
        parts.append(str(value))
    text = "".join(parts)
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    check(half is None, f"{where} holds {half!r}, half a character: give valid Unicode")
    return text
