"""Reads lines and rows of files: text, JSON lines, and tables."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any

from lsjax.config import AnyPath, ConfigError, check
from lsjax.config.paths import find_data

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]
PlacedRow = tuple[str, str, Fields]  # short name, location in words, fields
Refuse = Callable[[ConfigError], None]  # called with the error of a bad line


def stop_at(error: ConfigError) -> None:
    """Default `refuse`: raises the error. If another `refuse` returns, the line is skipped."""
    raise error


def read_lines(
    file: AnyPath, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, str]]:
    """Number, offset of the first byte, and text of each line of a UTF-8 file.

    Decompresses a .gz file, removes a byte order mark, and ends lines with \\n. Raises ConfigError
    for a damaged .gz file.
    begin, end: only lines whose first byte is in this range, numbered from 1.
    """
    at = begin
    try:
        # Files in buckets are read slowly without a large buffer.
        with file.open("rb") as raw, io.BufferedReader(raw, 1 << 20) as buffer:
            lines = gzip.GzipFile(fileobj=buffer) if file.suffix == ".gz" else buffer
            if begin:
                lines.seek(begin - 1)
                at += len(lines.readline()) - 1
            for number, line in enumerate(lines, 1):
                if end is not None and at >= end:
                    return
                try:
                    text = line.decode("utf-8" if at else "utf-8-sig")
                except UnicodeDecodeError:
                    problem = "is not UTF-8 text: save it as UTF-8"
                    refuse(ConfigError(f"{file}, line {number} {problem}"))
                    continue
                finally:
                    at, offset = at + len(line), at
                yield number, offset, text[:-2] + "\n" if text.endswith("\r\n") else text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{file} cannot be decompressed ({error}): get it again") from None


def json_rows(
    file: AnyPath, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line numbers and objects of a .jsonl file; skips blank lines."""
    for number, _, line in read_lines(file, refuse, begin, end):
        if not line.strip():
            continue
        try:
            row, problem = json.loads(line), "is not an object: write {...}"
        except (ValueError, RecursionError) as error:
            row, problem = None, f"is not JSON ({getattr(error, 'msg', error)}): correct it"
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(ConfigError(f"{file}, line {number} {problem}"))


def tab_separated_rows(
    file: AnyPath, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line numbers and columns, keyed by the header's names; quotes are plain characters."""
    lines = read_lines(file, refuse, begin, end)
    if begin:  # the header is the first line that is not blank
        heads = (one for one in read_lines(file, refuse) if one[2].replace("\t", "").strip())
        lines = chain(islice(heads, 1), lines)
    columns = ((number, line.removesuffix("\n").split("\t")) for number, _, line in lines)
    yield from _named_columns(file, columns, refuse)


def comma_separated_rows(file: AnyPath, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Rows of a .csv file, as of a .tsv; quoted columns may contain commas and line breaks."""
    reader = csv.reader(line for *_, line in read_lines(file, refuse))
    begins = (reader.line_num + 1 for _ in repeat(None))
    try:
        yield from _named_columns(file, zip(begins, reader, strict=False), refuse)
    except csv.Error as error:  # such as a column of more than 128 KB
        where = f"{file}, line {reader.line_num}"
        raise ConfigError(f"{where} is not CSV ({error}): correct it") from None


def _named_columns(
    file: AnyPath, lines: Iterator[tuple[int, list[str]]], refuse: Refuse
) -> Iterator[tuple[int, Fields]]:
    rows = ((number, columns) for number, columns in lines if "".join(columns).strip())
    _, names = next(rows, (0, []))
    for number, columns in rows:
        if len(columns) == len(names):
            yield number, dict(zip(names, columns, strict=True))
        else:
            counts = f"{len(columns)} columns, but the header has {len(names)}"
            refuse(ConfigError(f"{file}, line {number} has {counts}: correct the line"))


READERS = {".jsonl": json_rows, ".tsv": tab_separated_rows, ".csv": comma_separated_rows}


def file_rows(paths: Sequence[str], refuse: Refuse = stop_at) -> Iterator[PlacedRow]:
    """Rows of .jsonl, .tsv and .csv files, also as .gz. Logs the number of empty files. Raises
    ConfigError for a missing file, another extension, and if all files are empty."""
    files, warnings = find_data(paths)
    for warning in warnings:
        log.warning("%s", warning)
    for file in files:
        kind = AnyPath(file.name.removesuffix(".gz")).suffix
        check(kind in READERS, f"{file}: extension {kind!r} is not one of {', '.join(READERS)}")
        for number, row in READERS[kind](file, refuse):
            yield f"{file.name}:{number}", f"{file}, line {number}", row
