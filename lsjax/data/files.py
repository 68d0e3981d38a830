"""Finds files by pattern, reads their lines or rows, and writes files atomically."""

import csv
import glob
import gzip
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.config import ConfigError, check

Fields = Mapping[str, Any]
PlacedRow = tuple[str, str, Fields]  # short name, location in words, fields
Refuse = Callable[[ConfigError], None]  # called with the error of a bad line


def cache_directory() -> Path:
    """The cache directory: $LSJAX_CACHE, else lsjax in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LSJAX_CACHE") or Path(base) / "lsjax")


def find_files(paths: Sequence[str]) -> list[Path]:
    """Files that match the paths and patterns (*, ?, [...], ** for directories), each once.

    Matches of a pattern are sorted. Raises ConfigError if a path or pattern matches no file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        literal = Path(path).expanduser()
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        # An existing path is taken literally, even if it looks like a pattern.
        matches = [literal] if literal.exists() else sorted(glob.glob(str(literal), recursive=True))
        files = [file for file in map(Path, matches) if file.is_file()]
        check(bool(files), f"no file matches {path}: check the path and the current directory")
        found |= dict.fromkeys(files)
    return list(found)


def stop_at(error: ConfigError) -> None:
    """Default `refuse`: raises the error. If another `refuse` returns, the line is skipped."""
    raise error


def read_lines(
    file: Path, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of a UTF-8 file; decompresses a .gz file.

    Removes a byte order mark, and ends lines with \\n. Raises ConfigError for a damaged .gz file.
    begin, end: only lines whose first byte is in this range, numbered from 1.
    """
    lines = lines_with_offsets(file, refuse, begin)
    lines = lines if end is None else takewhile(lambda one: one[1] < end, lines)
    return ((number, line) for number, _, line in lines)


def lines_with_offsets(
    file: Path, refuse: Refuse = stop_at, begin: int = 0
) -> Iterator[tuple[int, int, str]]:
    """Number, offset of the first byte, and text of the lines that begin at `begin` or later."""
    at = begin
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            if begin:
                lines.seek(begin - 1)
                at += len(lines.readline()) - 1
            for number, line in enumerate(lines, 1):
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
    file: Path, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line numbers and objects of a .jsonl file; skips blank lines."""
    for number, line in read_lines(file, refuse, begin, end):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"is not JSON ({getattr(error, 'msg', error)}): correct it"
            refuse(ConfigError(f"{file}, line {number} {problem}"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(ConfigError(f"{file}, line {number} is not an object: write {{...}}"))


def tab_separated_rows(
    file: Path, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line numbers and columns, keyed by the header's names; quotes are plain characters."""
    lines = read_lines(file, refuse, begin, end)
    if begin:  # the header is the first line that is not blank
        heads = (one for one in read_lines(file, refuse) if one[1].replace("\t", "").strip())
        lines = chain(islice(heads, 1), lines)
    columns = ((number, line.removesuffix("\n").split("\t")) for number, line in lines)
    yield from _named_columns(file, columns, refuse)


def comma_separated_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Rows of a .csv file, as of a .tsv; quoted columns may contain commas and line breaks."""

    def lines() -> Iterator[tuple[int, list[str]]]:
        reader, begin = csv.reader(line for _, line in read_lines(file, refuse)), 1
        try:
            for columns in reader:
                yield begin, columns
                begin = reader.line_num + 1
        except csv.Error as error:  # such as a column of more than 128 KB
            raise ConfigError(f"{file}, line {begin} is not CSV ({error}): correct it") from None

    yield from _named_columns(file, lines(), refuse)


def _named_columns(
    file: Path, lines: Iterator[tuple[int, list[str]]], refuse: Refuse
) -> Iterator[tuple[int, Fields]]:
    rows = ((number, columns) for number, columns in lines if "".join(columns).strip())
    _, names = next(rows, (0, []))
    for number, columns in rows:
        if len(columns) == len(names):
            yield number, dict(zip(names, columns, strict=True))
        else:
            counts = f"{len(columns)} columns, but the header has {len(names)}"
            refuse(ConfigError(f"{file}, line {number} has {counts}: correct the line"))


# Keyed by file extension; .gz may follow it.
READERS = {".jsonl": json_rows, ".tsv": tab_separated_rows, ".csv": comma_separated_rows}


def file_rows(
    paths: Sequence[str], refuse: Refuse = stop_at, kind: str | None = None
) -> Iterator[PlacedRow]:
    """Rows of .jsonl, .tsv and .csv files, also compressed as .gz.

    kind: one of these extensions for all files, whatever their names. Raises ConfigError for a
    missing file or another extension.
    """
    for file in find_files(paths):
        own = kind or (Path(file.stem).suffix if file.suffix == ".gz" else file.suffix)
        check(own in READERS, f"{file}: extension {own!r} is not one of {', '.join(READERS)}")
        for number, row in READERS[own](file, refuse):
            yield f"{file.name}:{number}", f"{file}, line {number}", row


def one_line(error: BaseException) -> str:
    """A library's error message on one line, or the error's type if the message is empty."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def read_json(file: Path, error_type: type[ValueError]) -> dict[str, Any]:
    """The object in a JSON file; raises `error_type` for anything else."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_type(f"{file}: is not JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise error_type(f"{file}: holds a {type(raw).__name__}, but must be a JSON object")
    return raw


def gguf_parts(file: Path) -> list[Path]:
    """All files of a split GGUF, named NAME-00001-of-00003.gguf; the file itself if not split."""
    part = re.fullmatch(r"(.+-)\d{5}(-of-(?!0{5})(\d{5})\.gguf)", file.name)
    if part is None:
        return [file]
    name, of, count = part.groups()
    return [file.with_name(f"{name}{number:05d}{of}") for number in range(1, int(count) + 1)]


def open_gguf(file: Path, error_type: type[ValueError]) -> Any:
    """The gguf package's reader for a file.

    Raises `error_type` if the package is not installed. Also raises it unless the file is a
    complete little-endian GGUF of version 2 or 3.
    """
    try:
        import gguf
    except ImportError as error:
        raise error_type(
            f"{file}: reading GGUF files needs the gguf package: pip install 'lsjax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """Raises at slices past the file's end: gguf shortens them, and loops on huge counts."""

        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                size = int(count) * np.dtype(dtype).itemsize
                raise ValueError(f"{size} bytes at {offset} exceed its {len(self.data)} bytes")
            return values

    try:
        reader = Reader(file)
    except OSError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise error_type(
            f"{file}: not a complete GGUF file ({problem}): damaged or cut off, download it again"
        ) from error
    if reader.byte_order == "S":
        raise error_type(f"{file}: is a big-endian GGUF: use a little-endian one")
    return reader


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: indented, with a newline at the end."""
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file atomically: under a temporary name first, then renamed."""
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yields a directory to write into, and renames it to `directory` if the block succeeds.

    If another process has created `directory` by then, that one stays.
    """
    partial = _partial(directory)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".partial-{uuid.uuid4().hex}")
