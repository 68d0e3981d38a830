"""Files: found by patterns, read line by line or row by row, and written whole or not at all."""

import csv
import glob
import gzip
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.config import ConfigError, check

Fields = Mapping[str, Any]
PlacedRow = tuple[str, str, Fields]  # a short name, where it stands in words, and its fields
Refuse = Callable[[ConfigError], None]  # is called with the error of a bad line


def cache_directory() -> Path:
    """Holds what can be made again: $LSJAX_CACHE, else lsjax in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LSJAX_CACHE") or Path(base) / "lsjax")


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns (*, ?, [...], ** for directories) name, each once.

    Those of a pattern are sorted. Raises ConfigError for a path or pattern that names none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        literal = Path(path).expanduser()
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        # An existing path is itself, even if it looks like a pattern.
        matches = [literal] if literal.exists() else sorted(glob.glob(str(literal), recursive=True))
        files = [file for file in map(Path, matches) if file.is_file()]
        check(bool(files), f"no file matches {path}: check paths and the directory you are in")
        found |= dict.fromkeys(files)
    return list(found)


def stop_at(error: ConfigError) -> None:
    """The default `refuse`; where another one returns, the line is left out."""
    raise error


def read_lines(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines of a UTF-8 file; a .gz file is unpacked.

    A byte order mark is left out, and lines end with \\n. Raises ConfigError for a broken .gz file.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    problem = "is not UTF-8 text: save it as UTF-8"
                    refuse(ConfigError(f"{file}, line {number} {problem}"))
                    continue
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{file} can't be unpacked ({error}): get it again") from None


def json_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Line numbers and objects of a .jsonl file; blank lines do not count."""
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
    """Line numbers and columns by the names in the header; quotes are plain characters."""
    lines = ((n, line.removesuffix("\n").split("\t")) for n, line in read_lines(file, refuse))
    yield from _named_columns(file, lines, refuse)


def comma_separated_rows(file: Path, refuse: Refuse = stop_at) -> Iterator[tuple[int, Fields]]:
    """Rows of a .csv file like those of a .tsv; quoted columns may hold commas and line ends."""

    def lines() -> Iterator[tuple[int, list[str]]]:
        reader, begin = csv.reader(line for _, line in read_lines(file, refuse)), 1
        try:
            for columns in reader:
                yield begin, columns
                begin = reader.line_num + 1
        except csv.Error as error:  # such as a column of more than 128 KB
            raise ConfigError(f"{file}, line {begin} is not CSV ({error}): mend it") from None

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
            counts = f"{len(columns)} columns, the header {len(names)}"
            refuse(ConfigError(f"{file}, line {number} has {counts}: a tab or a line too many?"))


# By the end of a file's name, behind which .gz may stand.
READERS = {".jsonl": json_rows, ".tsv": tab_separated_rows, ".csv": comma_separated_rows}


def file_rows(
    paths: Sequence[str], refuse: Refuse = stop_at, kind: str | None = None
) -> Iterator[PlacedRow]:
    """The rows of files: .jsonl, .tsv or .csv, each also as .gz.

    kind: one of these for all files, whatever their names. Raises ConfigError for a missing file
    and for one of another kind.
    """
    for file in find_files(paths):
        own = kind or (Path(file.stem).suffix if file.suffix == ".gz" else file.suffix)
        check(
            own in READERS, f"{file}: rows come from {', '.join(READERS)}, not from {own or 'that'}"
        )
        for number, row in READERS[own](file, refuse):
            yield f"{file.name}:{number}", f"{file}, line {number}", row


def one_line(error: BaseException) -> str:
    """What the error of a library says, or its type if it says nothing."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def read_json(file: Path, error_type: type[ValueError]) -> dict[str, Any]:
    """The object in a JSON file; raises an error of this type for anything else."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_type(f"{file}: is not JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise error_type(f"{file}: holds a {type(raw).__name__}, but must be a JSON object")
    return raw


def open_gguf(file: Path, error_type: type[ValueError]) -> Any:
    """The gguf package's reader of a file.

    Raises an error of this type where the package is not installed, and for anything but a whole
    little-endian file of version 2 or 3.
    """
    try:
        import gguf
    except ImportError as error:
        raise error_type(
            f"{file}: reading GGUF files needs the gguf package: pip install 'lsjax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """Slices beyond the end of a file are short, not errors; a huge count would loop."""

        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                size = int(count) * np.dtype(dtype).itemsize
                raise ValueError(f"{size} bytes at {offset} are not in its {len(self.data)}")
            return values

    try:
        reader = Reader(file)
    except OSError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise error_type(
            f"{file}: not a whole GGUF file ({problem}): damaged or cut short, download it again"
        ) from error
    if reader.byte_order == "S":
        raise error_type(f"{file}: is a big-endian GGUF; only little-endian ones are read")
    return reader


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes the file whole: indented, with a newline at the end."""
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file under another name first, and then renames it."""
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes the given name when the block has ended well.

    One that another process has finished by then stays.
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
