"""Pieces of a source: every document is in exactly one, wherever the files are divided."""

import gzip
import json
import random

import pytest

from lsjax.config import ConfigError, DataConfig
from lsjax.data import pieces as pieces_module, sources
from lsjax.data.pieces import Document
from lsjax.data.sources import document_source

TEXTS = [f"{n}: naïve\nline {n} " + "é" * (n % 9) for n in range(70)]


@pytest.fixture(params=[1, 7, 40, 1_000_000])
def small_pieces(request, monkeypatch):
    """Pieces of about this many bytes."""
    monkeypatch.setattr(pieces_module, "SMALLEST_PIECE", request.param)
    monkeypatch.setattr(pieces_module, "MANY_PIECES", 1 << 40)
    return request.param


def in_pieces(config):
    source = document_source(config)
    pieces = source.pieces()
    found = [document for piece in pieces for document in source.in_piece(piece)]
    assert found == list(source.documents())
    bytes_ = sum(end - begin for piece in pieces for _, begin, end in piece.ranges)
    assert bytes_ == sum(file.stat().st_size for file in source.files)
    return [document.text for document in found], pieces


@pytest.mark.parametrize("separator", ["blank_line", "<|end|>", "\n---\n"])
def test_documents_of_text(tmp_path, small_pieces, separator):
    between = "\n\n \n" if separator == "blank_line" else separator
    for name, texts in (("a.txt", TEXTS[:50]), ("b.txt", TEXTS[50:])):
        (tmp_path / name).write_text(between.join(texts) + between * (name == "b.txt"))
    paths = (f"{tmp_path}/*.txt",)
    texts, pieces = in_pieces(DataConfig(source="text", paths=paths, separator=separator))
    assert texts == TEXTS
    assert (len(pieces) > 20) == (small_pieces < 100 and "\n" not in separator)


def test_separators_at_both_ends_and_in_a_row(tmp_path, small_pieces):
    (tmp_path / "a.txt").write_text("||a|b||c\nd|e\n|\n|f||")
    config = DataConfig(source="text", paths=(f"{tmp_path}/a.txt",), separator="|")
    assert in_pieces(config)[0] == ["a", "b", "c\nd", "e\n", "f"]
    (tmp_path / "a.txt").write_text("\n\na\n\n\nb\nc\n \t\n  d\n\n")
    config = DataConfig(source="text", paths=(f"{tmp_path}/a.txt",), separator="blank_line")
    assert in_pieces(config)[0] == ["a", "b\nc", "  d"]


def test_rows_and_headers(tmp_path, small_pieces):
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    texts, _ = in_pieces(DataConfig(source="jsonl", paths=(f"{tmp_path}/a.jsonl",)))
    assert texts == TEXTS
    lines = [f"{n}\tanswer {n}" for n in range(40)]
    (tmp_path / "a.tsv").write_text("\n".join(["number\ttext", "\t", *lines]))
    texts, _ = in_pieces(DataConfig(source="tsv", paths=(f"{tmp_path}/a.tsv",)))
    assert texts == [f"answer {n}" for n in range(40)]


def test_files_that_are_one_document(tmp_path, small_pieces):
    for n, text in enumerate(TEXTS):
        (tmp_path / f"{n:03d}.txt").write_text(text)
    texts, pieces = in_pieces(DataConfig(source="text", paths=(f"{tmp_path}/*.txt",)))
    assert "".join(texts) == "".join(TEXTS)
    if small_pieces > 100:
        assert texts == TEXTS and len(pieces) == 1


def test_compressed_files_are_not_divided(tmp_path, small_pieces):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("|".join(TEXTS))
    config = DataConfig(source="text", paths=(f"{tmp_path}/a.txt.gz",), separator="|")
    texts, pieces = in_pieces(config)
    assert texts == TEXTS and len(pieces) == 1


def test_a_limit_ends_the_pieces(tmp_path, small_pieces):
    (tmp_path / "a.txt").write_text("|".join(TEXTS))
    for limit in (1, 13, 70, 99):
        config = DataConfig(
            source="text", paths=(f"{tmp_path}/a.txt",), separator="|", max_documents=limit
        )
        source = document_source(config)
        pieces = source.pieces()
        found = [document for piece in pieces for document in source.in_piece(piece)]
        assert found == list(source.documents()) == [Document(text) for text in TEXTS[:limit]]


def test_a_large_file_without_a_separator_is_cut_at_line_ends(tmp_path, monkeypatch):
    """And the warning names the fix."""
    monkeypatch.setattr(pieces_module, "SMALLEST_PIECE", 1000)
    monkeypatch.setattr(sources, "LARGE_DOCUMENT", 5000)
    draw = random.Random(0)
    lines = ["x" * draw.randrange(60) for _ in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    config = DataConfig(source="text", paths=(f"{tmp_path}/a.txt",))
    texts, pieces = in_pieces(config)
    assert "".join(texts) == "\n".join(lines) and len(pieces) > 8
    assert all(text.endswith("\n") and len(text) < 1100 for text in texts[:-1])
    assert "set data.separator to blank_line" in document_source(config).warnings[0]


def test_a_text_without_its_marker_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_PIECE", 1000)
    (tmp_path / "a.txt").write_text("line\n" * 1000)
    config = DataConfig(source="text", paths=(f"{tmp_path}/a.txt",), separator="|")
    source = document_source(config)
    documents = list(source.read(source.files[0], 0, None))
    assert "".join(one.text for one in documents) == "line\n" * 1000
    assert max(len(one.text) for one in documents) < 1010


def test_lines_are_numbered_from_the_begin_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 30 + "[]\n")
    source = document_source(DataConfig(source="jsonl", paths=(f"{tmp_path}/a.jsonl",)))
    with pytest.raises(ConfigError, match="a.jsonl, line 31 is not an object"):
        list(source.documents())


ROWS = {"jsonl": '{"text": "a b"}\n', "tsv": "text\na b\n", "text": "a b"}


def with_empty_files(tmp_path, suffix, content):
    """Files of which the first, the third and the last are empty."""
    for name in ("0", "2", "4"):
        (tmp_path / f"{name}{suffix}").touch()
    for name in ("1", "3"):
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    return f"{tmp_path}/*{suffix}"


@pytest.mark.parametrize(
    ("kind", "separator"),
    [
        *(("jsonl", "file"), ("tsv", "file")),
        *(("text", separator) for separator in ("file", "blank_line", "|", "\n|\n")),
    ],
)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_empty_files_are_skipped_and_counted(tmp_path, small_pieces, kind, separator, compressed):
    content = ROWS[kind].encode()
    content, suffix = (gzip.compress(content), ".gz") if compressed else (content, ".txt")
    pattern = with_empty_files(tmp_path, f".{kind}{suffix}", content)
    config = DataConfig(source=kind, paths=(pattern,), separator=separator)
    texts, _ = in_pieces(config)
    assert "".join(texts) == "a ba b"
    assert document_source(config).warnings == (f"{pattern}: 3 of 5 files are empty and skipped",)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("validation", [False, True])
def test_only_empty_files_are_refused(tmp_path, kind, validation):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.empty").touch()
    (tmp_path / "c.empty").touch()
    good, empty = (f"{tmp_path}/a.txt",), (f"{tmp_path}/*.empty",)
    paths = (good, empty) if validation else (empty, good)
    config = DataConfig(source=kind, paths=paths[0], validation_paths=paths[1])
    with pytest.raises(ConfigError, match=r"\*\.empty: every file is empty: name others"):
        document_source(config, validation=validation)


def test_compressed_files_without_content_hold_no_document(tmp_path, small_pieces):
    for name, text in (("a", ""), ("b", "one"), ("c", "")):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert in_pieces(DataConfig(source="text", paths=(f"{tmp_path}/*.gz",)))[0] == ["one"]


def test_an_empty_module_may_be_the_first_of_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    for name, text in (("a", ""), ("b", "one"), ("c", ""), ("d", "two")):
        (tmp_path / f"{name}.py").write_text(text)
    assert in_pieces(DataConfig())[0] == ["one", "two"]
