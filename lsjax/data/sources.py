"""Ordered documents and their sources: text files, rows of files, TFDS, Python's own source.

TFDS works without TensorFlow. It downloads most text data sets on first use, and names the files to
get by hand for the others. It also reads data sets that were prepared elsewhere.
"""

import hashlib
import importlib
import logging
import numbers
import os
import platform
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.files import (
    READERS,
    Fields,
    find_files,
    lines_with_offsets,
    one_line,
    read_lines,
)

log = logging.getLogger(__name__)

# Tests are repetitive, installed packages vary, and the rest is specific to one machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")
# Packages of TFDS whose classes it does not find without TensorFlow.
# Number of pieces that large sources are divided into, and limits of a piece's bytes.
MANY_PIECES, SMALLEST_PIECE, LARGEST_PIECE = 4096, 2_000_000, 32_000_000
LARGE_DOCUMENT, BLOCK = 10_000_000, 1 << 20
TFDS_PACKAGES = ("text", "summarization", "question_answering", "translate")


@dataclass(frozen=True)
class Document:
    """A text, or a response and its prompt."""

    text: str
    prompt: str = ""

    @property
    def key(self) -> int:
        """64-bit hash of the prompt, or of a text without one. Equal texts have equal keys, and so
        do all responses to one prompt."""
        content = (self.prompt or self.text).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Piece(NamedTuple):
    """The part of a source whose tokens are one shard.

    ranges: index of a file, first byte, and first byte after it. rows: the same of rows, for
    sources of rows without bytes. limit: maximum number of documents.
    """

    ranges: tuple[tuple[int, int, int], ...]
    rows: tuple[int, int] | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same on every machine with the same files.

    name: its name in messages. files: the files it reads. read: (file, begin, end) -> documents
    that begin in this range of bytes; with num_rows, (None, first, last) -> those of these rows. It
    raises ConfigError with file and line if it cannot. whole: files are not divided. part: names
    the part of the files, if not all are read. limit: maximum number of documents.
    """

    name: str
    files: Sequence[Path]
    read: Callable[[Path | None, int, int | None], Iterator[Document]]
    whole: bool = False
    num_rows: int | None = None
    part: str = ""
    limit: int | None = None

    def documents(self) -> Iterator[Document]:
        """The first `limit` documents whose text is not blank."""
        return islice((one for piece in self._pieces() for one in self.in_piece(piece)), self.limit)

    def in_piece(self, piece: Piece) -> Iterator[Document]:
        """The documents of a piece whose text is not blank."""
        ranges = [(self.files[index], begin, end) for index, begin, end in piece.ranges]
        # Offsets in the text of a .gz file are others than in the file, which is read as a whole.
        ranges = [(file, at, None if file.suffix == ".gz" else end) for file, at, end in ranges]
        if piece.rows is not None:
            ranges = [(None, *piece.rows)]
        found = (document for one in ranges for document in self.read(*one))
        return islice((one for one in found if one.text.strip()), piece.limit)

    def stats(self) -> list[tuple[str, int, int]]:
        """Name, size, and time of the last change of each file. Equal ones have equal contents."""
        found = ((file.name, file.stat()) for file in self.files)
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    def content(self, piece: Piece) -> str:
        """Hash (hex) of a piece's bytes."""
        digest = hashlib.sha256()
        for index, begin, end in piece.ranges:
            with self.files[index].open("rb") as file:
                file.seek(begin)
                for at in range(begin, end, BLOCK):
                    digest.update(file.read(min(BLOCK, end - at)))
        return digest.hexdigest()

    def pieces(self) -> list[Piece]:
        """All pieces, of about equal size. They depend on the sizes of the files, and on the
        documents if there is a limit."""
        pieces = self._pieces()
        if self.limit is None:
            return pieces
        left, taken = self.limit, []
        while left and len(taken) < len(pieces):
            piece = pieces[len(taken)]._replace(limit=left)
            left -= sum(1 for _ in self.in_piece(piece))
            taken.append(piece)
        return taken

    def _pieces(self) -> list[Piece]:
        sizes = [file.stat().st_size for file in self.files]
        most = min(max(sum(sizes) // MANY_PIECES, SMALLEST_PIECE), LARGEST_PIECE)
        if self.num_rows is not None:
            count = min(-(-sum(sizes) // most), self.num_rows) or 1
            files = [[] for _ in range(count)]
            for index, size in enumerate(sizes):
                files[index % count].append((index, 0, size))
            ends = [number * self.num_rows // count for number in range(count + 1)]
            return [
                Piece(tuple(own), rows) for own, rows in zip(files, pairwise(ends), strict=True)
            ]
        pieces: list[list[tuple[int, int, int]]] = []
        room = 0
        for index, (file, size) in enumerate(zip(self.files, sizes, strict=True)):
            parts = 1 if self.whole or file.suffix == ".gz" else max(1, -(-size // most))
            ends = [number * size // parts for number in range(parts + 1)]
            for begin, end in pairwise(ends):
                if end - begin > room or parts > 1:
                    pieces.append([])
                    room = most
                pieces[-1].append((index, begin, end))
                room -= end - begin
        return [Piece(tuple(ranges)) for ranges in pieces]


def document_source(config: DataConfig, *, validation: bool = False) -> Source:
    """The source of a configuration, or its separate validation set.

    Raises ConfigError if files are missing.
    """
    paths = config.validation_paths if validation else config.paths
    match config.source:
        case "python_source":
            source = python_source()
        case "text":
            source = text_files(paths, config.separator)
        case "tfds":
            part = config.validation_split if validation else config.tfds_split
            title, files, rows = tfds_split(config.tfds_name, part, config.tfds_data_dir)

            def read_rows(_, first: int, last: int) -> Iterator[Document]:
                wheres = (f"{title}, row {number}" for number in range(first, last))
                own = (rows[number] for number in range(first, last))
                return map(row_document, own, repeat(config), wheres)

            source = Source(title, files, read_rows, num_rows=len(rows), part=part)
        case kind:

            def read_lines_of(file: Path, begin: int, end: int | None) -> Iterator[Document]:
                for number, row in READERS[f".{kind}"](file, begin=begin, end=end):
                    yield row_document(row, config, f"{file}, line {number}")

            source = Source(" ".join(paths), find_files(paths), read_lines_of)
    return replace(source, limit=None if validation else config.max_documents)


def python_source() -> Source:
    """Text that every machine has: the standard library of the running Python.

    Each module is a document, in order of paths. Bytes that are not UTF-8 are replaced.
    """
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # prunes the walk
        own = (name for name in names if not name.startswith(OF_ONE_MACHINE))
        found += [Path(folder, name) for name in own if name.endswith(".py")]
    check(
        bool(found),
        f"{root} has no .py files: this Python lacks its source, set another --data.source",
    )
    files = sorted(found, key=Path.as_posix)

    def read(file: Path, begin: int, end: int | None) -> Iterator[Document]:
        yield Document(file.read_text(encoding="utf-8", errors="replace"))

    name = f"standard library of Python {platform.python_version()}"
    return Source(name, files, read, whole=True)


def text_files(paths: Sequence[str], separator: str) -> Source:
    """Documents of plain text, without separators.

    separator: "file" makes each file a document, in parts if it is large. "blank_line" splits at
      each run of blank lines. Any other string is a marker between documents.
    """
    files = find_files(paths)
    blank = separator == "blank_line"

    def cut(line: str) -> list[str]:
        return (
            ["", ""] if blank and not line.strip() else [line] if blank else line.split(separator)
        )

    def read(file: Path, begin: int, end: int | None) -> Iterator[Document]:
        if separator == "file":
            yield Document("".join(line for _, line in read_lines(file, begin=begin, end=end)))
            return
        if "\n" in separator:
            text = "".join(line for _, line in read_lines(file))
            yield from map(Document, text.split(separator))
            return
        # The documents after the separators in this range; at the file's begin also the first one.
        lines: list[str] | None = None if begin else []
        size, tail = 0, "\n" if blank else ""
        for _, at, line in lines_with_offsets(file, begin=begin):
            first, *others = cut(line)
            size += len(line)
            if lines is not None:
                lines.append(first)
            if (others or size > LARGEST_PIECE) and lines is not None:
                yield Document("".join(lines).removesuffix(tail))
                lines, size = [], 0
            if end is not None and at >= end and (others or lines is None):
                return
            if others:
                yield from map(Document, others[:-1])
                lines = others[-1:]
        yield Document("".join(lines or ()))

    large = [file for file in files if file.stat().st_size > LARGE_DOCUMENT]
    if separator == "file" and large:
        log.warning(
            "%s has %.1f MB and no separator, so it is cut into documents at line ends: set "
            "data.separator to blank_line, or to a marker between its documents",
            *(large[0], large[0].stat().st_size / 1e6),
        )
    return Source(" ".join(paths), files, read, whole="\n" in separator)


def tfds_split(
    name: str, split: str, data_dir: str = ""
) -> tuple[str, list[Path], Sequence[Fields]]:
    """A split of a TensorFlow data set, or part of one; downloaded if needed.

    Returns its name for messages, its files, and its rows, in which texts are bytes.

    Raises ConfigError for an unknown name or split, or a failed download. Also raises it for files
    to fetch by hand, or a data set that was prepared in another format.
    """
    import tensorflow_datasets as tfds  # slow to import

    builder = tfds_builder(name, data_dir=data_dir or None)
    if not builder.is_prepared():
        builder = tfds_builder(name, data_dir=data_dir or None, file_format="array_record")
        settings = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            builder.download_and_prepare(download_config=settings)
        except Exception as error:  # network, disk, data set, or files to get by hand
            raise ConfigError(
                f"{name} could not be prepared ({one_line(error)}): fix that, or prepare it "
                f"elsewhere with file_format='array_record' and copy it to {builder.data_path}"
            ) from error
    written = builder.info.file_format.value
    check(
        written == "array_record",
        f"{builder.data_path} was prepared as {written}, which only TensorFlow reads: prepare "
        'it again with file_format="array_record" in another tfds_data_dir',
    )
    try:
        source = builder.as_data_source(split=split)
        files = [Path(file) for file in builder.info.splits[split].filepaths]
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"{name} has no split {split!r} ({one_line(error)}): choose one of "
            f"{', '.join(builder.info.splits)}, or a part such as train[:10%]"
        ) from None
    return f"{name} {split}", files, source


def tfds_builder(name: str, **settings: Any) -> Any:
    """TFDS's builder for a data set. Raises ConfigError if the data set is unknown."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    dataset = name.partition("/")[0]
    modules = [f"{p}.{m}" for p in TFDS_PACKAGES for m in (f"{dataset}.{dataset}", dataset)]
    for module in (None, *modules):
        try:
            if module is not None:
                importlib.import_module(f"tensorflow_datasets.{module}")
            return tfds.builder(name, **settings)
        except (DatasetNotFoundError, ModuleNotFoundError):
            continue
        except Exception as error:  # unknown config or version, or an error of another site
            raise ConfigError(f"tfds_name {name!r}: {one_line(error)}") from None
    raise ConfigError(
        f"TensorFlow Datasets has no {name!r}: check the spelling, set the tfds_data_dir that "
        "holds it, or use source jsonl or tsv with its files"
    )


def training_documents(config: DataConfig) -> Iterator[Document]:
    """Documents that are not held out."""
    documents, fraction = document_source(config).documents(), config.held_out_fraction
    return (document for document in documents if not is_held_out(document.key, fraction))


def is_held_out(key: int | np.ndarray, fraction: float) -> bool | np.ndarray:
    """Whether documents with these keys belong to the validation share.

    Order and number of the documents have no effect. Equal documents are on the same side.
    """
    return key < int(fraction * 2**64)


def row_document(row: Fields, config: DataConfig, where: str) -> Document:
    """Builds a document from a row with the templates.

    Raises ConfigError, beginning with `where`, as `fill` does, or if the prompt is empty.
    """
    if config.has_prompts:
        prompt = fill(config.prompt_template, row, where)
        check(prompt.strip() != "", f"{where} has an empty prompt: remove the row")
        return Document(fill(config.response_template, row, where), prompt)
    return Document(fill(config.text_template, row, where))


def fill(template: str, row: Fields, where: str) -> str:
    """Replaces each {field} of the template with the row's value of that name.

    Raises ConfigError if a field is missing, not a text or number, or has a lone surrogate.
    """
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
    check(half is None, f"{where} contains {half!r}, a lone surrogate: give valid Unicode")
    return text
