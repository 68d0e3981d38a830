"""Finds files by pattern, reads their lines or rows, and writes files atomically."""

import csv
import glob
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from lsjax.config import ConfigError, Path, as_path, check, in_bucket

Fields = Mapping[str, Any]
PlacedRow = tuple[str, str, Fields]  # short name, location in words, fields
Refuse = Callable[[ConfigError], None]  # called with the error of a bad line


def cache_directory() -> Path:
    """The cache directory: $LSJAX_CACHE, else lsjax in $XDG_CACHE_HOME or ~/.cache."""
    return as_path(os.environ.get("LSJAX_CACHE") or _default_cache())


def local_cache() -> Path:
    """The cache directory, or the default one if $LSJAX_CACHE is in a bucket."""
    directory = cache_directory()
    return _default_cache() if in_bucket(directory) else directory


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (as_path(base) if base else as_path("~/.cache").expanduser()) / "lsjax"


def find_files(paths: Sequence[str]) -> list[Path]:
    """Files that match the paths and patterns (*, ?, [...], ** for directories), each once.

    Matches of a pattern are sorted. Raises ConfigError if a path or pattern matches no file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        literal = as_path(path).expanduser()
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        # An existing path is taken literally, even if it looks like a pattern.
        files = [literal] if literal.is_file() else _matches(literal)
        check(bool(files), f"no file matches {path}: check the path and the current directory")
        found |= dict.fromkeys(files)
    return list(found)


def _matches(pattern: Path) -> list[Path]:
    if not in_bucket(pattern):
        found = map(as_path, sorted(glob.glob(str(pattern), recursive=True)))
        return [file for file in found if file.is_file()]
    from lsjax.config.buckets import file_system

    try:
        found = file_system().glob(str(pattern), detail=True)
    except FileNotFoundError:  # no such bucket
        return []
    return [as_path(f"gs://{name}") for name in sorted(found) if found[name]["type"] == "file"]


def gguf_parts(file: Path) -> list[Path]:
    """All files of a split GGUF, named NAME-00001-of-00003.gguf; the file itself if not split."""
    part = re.fullmatch(r"(.+-)\d{5}(-of-(?!0{5})(\d{5})\.gguf)", file.name)
    if part is None:
        return [file]
    name, of, count = part.groups()
    return [file.with_name(f"{name}{number:05d}{of}") for number in range(1, int(count) + 1)]


def stop_at(error: ConfigError) -> None:
    """Default `refuse`: raises the error. If another `refuse` returns, the line is skipped."""
    raise error


def read_lines(
    file: Path, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
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
    file: Path, refuse: Refuse = stop_at, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Fields]]:
    """Line numbers and objects of a .jsonl file; skips blank lines."""
    for number, _, line in read_lines(file, refuse, begin, end):
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
        heads = (one for one in read_lines(file, refuse) if one[2].replace("\t", "").strip())
        lines = chain(islice(heads, 1), lines)
    columns = ((number, line.removesuffix("\n").split("\t")) for number, _, line in lines)
    yield from _named_columns(file, columns, refuse)


def comma_separated_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Rows of a .csv file, as of a .tsv; quoted columns may contain commas and line breaks."""

    def lines() -> Iterator[tuple[int, list[str]]]:
        reader, begin = csv.reader(line for *_, line in read_lines(file, refuse)), 1
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
        own = kind or (as_path(file.stem).suffix if file.suffix == ".gz" else file.suffix)
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


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: indented, with a newline at the end."""
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file atomically: under a temporary name first, then renamed. A file in a bucket
    appears when it is complete."""
    if in_bucket(file):
        file.write_bytes(content)
        return
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path, last: str = "") -> Iterator[Path]:
    """Yields a local directory to write into. If the block succeeds, it is renamed to `directory`,
    or its files are copied to the bucket.

    last: the file that is copied after all others, so that it marks a complete directory.
    If another process has created `directory` by then, that one stays.
    """
    if in_bucket(directory):
        local_cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=local_cache()) as folder:
            yield as_path(folder)
            _upload(as_path(folder), directory, last)
        return
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
        remove_directory(partial)


def _upload(folder: Path, directory: Path, last: str) -> None:
    from lsjax.config.buckets import file_system

    storage = file_system()
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    for some in ([name for name in names if name != last], [last] if last in names else []):
        if last and (directory / last).exists():
            return
        if some:
            here, there = ([str(base / name) for name in some] for base in (folder, directory))
            storage.put(here, there)


def remove_directory(directory: Path) -> None:
    """Removes a directory with all that it holds, if it exists."""
    if in_bucket(directory):
        directory.rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".partial-{uuid.uuid4().hex}")
