"""Ordered documents and their sources: text files, rows of files, TFDS, Python's own source.

TFDS works without TensorFlow. It downloads most text data sets on first use, and names the files to
get by hand for the others. It also reads data sets that were prepared elsewhere.
"""

import hashlib
import importlib
import numbers
import os
import platform
import re
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.files import Fields, file_rows, find_files, one_line, read_lines

# Tests are repetitive, installed packages vary, and the rest is specific to one machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")
# Packages of TFDS whose classes it does not find without TensorFlow.
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


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same on every machine with the same files.

    name: its name in messages. files: the files it reads. read: yields the documents, and raises
    ConfigError with file and line if it cannot. part: names the part of the files, if not all are
    read. limit: maximum number of documents.
    """

    name: str
    files: Sequence[Path]
    read: Callable[[], Iterator[Document]]
    part: str = ""
    limit: int | None = None

    def documents(self) -> Iterator[Document]:
        """The first `limit` documents whose text is not blank."""
        return islice((one for one in self.read() if one.text.strip()), self.limit)

    def fingerprint(self) -> str:
        """Hash (hex) of the files' contents, in order; ignores file names."""
        whole = hashlib.sha256(self.part.encode())
        for path in self.files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()


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
            found = tfds_split(config.tfds_name, part, config.tfds_data_dir)
            source = _row_source(config, *found, part)
        case kind:
            rows = partial(file_rows, paths, kind=f".{kind}")
            source = _row_source(config, " ".join(paths), find_files(paths), rows)
    return replace(source, limit=None if validation else config.max_documents)


def _row_source(
    config: DataConfig,
    name: str,
    files: Sequence[Path],
    rows: Callable[[], Iterator[tuple[Any, ...]]],
    part: str = "",
) -> Source:
    def read() -> Iterator[Document]:
        return (row_document(row, config, where) for *_, where, row in rows())

    return Source(name, files, read, part)


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

    def read() -> Iterator[Document]:
        return (Document(file.read_text(encoding="utf-8", errors="replace")) for file in files)

    return Source(f"standard library of Python {platform.python_version()}", files, read)


def text_files(paths: Sequence[str], separator: str) -> Source:
    """Documents of plain text, without separators.

    separator: "file" makes each file a document. "blank_line" splits at each run of blank lines.
      Any other string is a marker between documents.
    """
    files = find_files(paths)

    def read() -> Iterator[Document]:
        for file in files:
            text = "".join(line for _, line in read_lines(file))
            match separator:
                case "file":
                    pieces = [text]
                case "blank_line":
                    pieces = re.split(r"\n(?:[^\S\n]*\n)+", text)
                case marker:
                    pieces = text.split(marker)
            yield from map(Document, pieces)

    return Source(" ".join(paths), files, read)


def tfds_split(
    name: str, split: str, data_dir: str = ""
) -> tuple[str, list[Path], Callable[[], Iterator[tuple[str, Fields]]]]:
    """A split of a TensorFlow data set, or part of one; downloaded if needed.

    Returns its name for messages, its files, and a function that yields the place and the fields of
    each row. Texts are bytes.

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
    title = f"{name} {split}"
    return title, files, lambda: ((f"{title}, row {n}", source[n]) for n in range(len(source)))


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
