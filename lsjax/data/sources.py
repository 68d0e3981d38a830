"""Ordered documents and their sources: text files, rows of files, TFDS, Python's own source.

TFDS works without TensorFlow. It downloads most text data sets on first use, and names the files to
get by hand for the others. It also reads data sets that were prepared elsewhere.
"""

import importlib
import numbers
import os
import platform
import string
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lsjax.config import AnyPath, ConfigError, DataConfig, as_path, check, in_bucket
from lsjax.config.paths import find_data
from lsjax.data.pieces import LARGEST_PIECE, Document, Source
from lsjax.io.files import one_line
from lsjax.io.rows import READERS, Fields, read_lines

# Tests are repetitive, installed packages vary, and the rest is specific to one machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")
LARGE_DOCUMENT = 10_000_000  # bytes of a file above which a separator is missed
# Packages of TFDS whose classes it does not find without TensorFlow.
TFDS_PACKAGES = ("text", "summarization", "question_answering", "translate")


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
                for number in range(first, last):
                    yield row_document(rows[number], config, f"{title}, row {number}")

            source = Source(title, files, read_rows, num_rows=len(rows), part=part)
        case "array_record":
            source = array_records(paths, config.ids_field)
        case kind:

            def read_lines_of(file: AnyPath, begin: int, end: int | None) -> Iterator[Document]:
                for number, row in READERS[f".{kind}"](file, begin=begin, end=end):
                    yield row_document(row, config, f"{file}, line {number}")

            files, warnings = find_data(paths)
            source = Source(" ".join(paths), files, read_lines_of, warnings=warnings)
    return replace(source, limit=None if validation else config.max_documents)


def python_source() -> Source:
    """Text that every machine has: the standard library of the running Python.

    Each module is a document, in order of paths. Bytes that are not UTF-8 are replaced.
    """
    root, found = as_path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # prunes the walk
        own = (name for name in names if not name.startswith(OF_ONE_MACHINE))
        found += [as_path(folder) / name for name in own if name.endswith(".py")]
    check(bool(found), f"{root} lacks Python's source, .py files: set another --data.source")

    def read(file: AnyPath, begin: int, end: int | None) -> Iterator[Document]:
        yield Document(file.read_text(encoding="utf-8", errors="replace"))

    name = f"standard library of Python {platform.python_version()}"
    return Source(name, sorted(found, key=AnyPath.as_posix), read, whole=True)


def text_files(paths: Sequence[str], separator: str) -> Source:
    """Documents of plain text, without separators.

    separator: "file" makes each file a document, in parts if it is large. "blank_line" splits at
      each run of blank lines. Any other string is a marker between documents.
    """
    files, warnings = find_data(paths)
    whole, blank = "\n" in separator, separator == "blank_line"

    def read(file: AnyPath, begin: int, end: int | None) -> Iterator[Document]:
        if whole or separator == "file":
            text = "".join(line for *_, line in read_lines(file, begin=begin, end=end))
            yield from map(Document, text.split(separator) if whole else [text])
            return
        # The documents after the separators in this range; at the file's begin also the first one.
        lines: list[str] | None = None if begin else []
        size, tail = 0, "\n" if blank else ""
        for _, at, line in read_lines(file, begin=begin):
            if blank:
                first, *others = [line] if line.strip() else ["", ""]
            else:
                first, *others = line.split(separator)
            size += len(line)
            if lines is not None:
                lines.append(first)
                if others or size > LARGEST_PIECE:
                    yield Document("".join(lines).removesuffix(tail))
                    lines, size = [], 0
            if end is not None and at >= end and (others or lines is None):
                return
            if others:
                yield from map(Document, others[:-1])
                lines = others[-1:]
        yield Document("".join(lines or ()))

    size, largest = max((file.stat().st_size, file) for file in files)
    if separator == "file" and size > LARGE_DOCUMENT:
        cut = (
            f"{largest} has {size / 1e6:.1f} MB and no separator, so it is cut into documents at "
            "line ends: set data.separator to blank_line, or to a marker between its documents"
        )
        warnings = (*warnings, cut)
    return Source(" ".join(paths), files, read, whole=whole, warnings=warnings)


def array_records(paths: Sequence[str], field: str) -> Source:
    """Documents that are token ids already, in ArrayRecord files of tf.train.Example."""
    # They are slow to import.
    from grain.sources import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2

    (files, warnings), name = find_data(paths), " ".join(paths)
    check(not any(map(in_bucket, files)), f"{name}: ArrayRecord files must be on a disk: copy them")
    try:
        records = ArrayRecordDataSource([str(file) for file in files])
        num_rows = len(records)
    except Exception as error:  # of the format's own library
        raise ConfigError(f"{name}: not ArrayRecord files ({one_line(error)})") from None

    def read(_, first: int, last: int) -> Iterator[Document]:
        for number in range(first, last):
            try:
                features = tf_example_pb2.Example.FromString(records[number]).features.feature
            except Exception as error:  # likewise
                where = f"{name}, record {number}"
                raise ConfigError(f"{where} is no Example ({one_line(error)})") from None
            ids = tuple(features[field].int64_list.value) if field in features else ()
            check(
                bool(ids),
                f"{name}, record {number} has no integers under {field!r}, it has "
                f"{', '.join(sorted(features)) or 'nothing'}: set data.ids_field",
            )
            yield Document(ids=ids)

    return Source(name, files, read, num_rows=num_rows, warnings=warnings)


def tfds_split(
    name: str, split: str, data_dir: str = ""
) -> tuple[str, list[AnyPath], Sequence[Fields]]:
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
        files = [as_path(file) for file in builder.info.splits[split].filepaths]
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
        names = ", ".join(map(str, row))
        check(field in row, f"{where} has no field {field!r}, it has {names}: change the template")
        value = row[field]
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        good = isinstance(value, str | numbers.Real) and not isinstance(value, bool)
        check(good, f"{where}: {field} is {value!r:.40}, but must be a text or a number")
        parts.append(str(value))
    text = "".join(parts)
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    check(half is None, f"{where} contains {half!r}, a lone surrogate: give valid Unicode")
    return text
