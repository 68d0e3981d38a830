"""Files, patterns, and the documents in them."""

import pytest

from lsjax.config import ConfigError
from lsjax.config.paths import find_files
from lsjax.data.sources import text_files
from lsjax.io.rows import file_rows, read_lines


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("one\n\ntwo\nlines\n \n\nthree\n<end>four<end>\n")
    (tmp_path / "a.txt").write_text("five")
    (tmp_path / "deep" / "er" / "c.txt").write_text("  \n")
    (tmp_path / "odd[1].txt").write_text("six")
    return tmp_path


def texts(folder, separator):
    return [d.text for d in text_files([f"{folder}/b.txt"], separator).documents()]


def test_documents_end_with_the_file_at_blank_lines_or_at_a_marker(folder):
    assert texts(folder, "file") == ["one\n\ntwo\nlines\n \n\nthree\n<end>four<end>\n"]
    assert texts(folder, "blank_line") == ["one", "two\nlines", "three\n<end>four<end>\n"]
    assert texts(folder, "<end>") == ["one\n\ntwo\nlines\n \n\nthree\n", "four"]


def test_patterns_are_sorted_and_no_file_comes_twice(folder):
    names = [file.name for file in find_files([f"{folder}/**/*.txt", f"{folder}/a.txt"])]
    assert names == ["a.txt", "b.txt", "c.txt", "odd[1].txt"]
    assert [f.name for f in find_files([f"{folder}/odd[1].txt"])] == ["odd[1].txt"]


def test_blank_files_are_no_documents(folder):
    assert list(text_files([f"{folder}/deep/er/c.txt"], "file").documents()) == []


def test_missing_files_and_directories_are_named(folder):
    with pytest.raises(ConfigError, match=r"no file matches .*none\*\.txt: check the path"):
        find_files([f"{folder}/none*.txt"])
    with pytest.raises(
        ConfigError, match=r"deep/ is a directory: name its files, such as .*deep/\*\*"
    ):
        find_files([f"{folder}/deep/"])


def test_text_is_utf8_without_its_mark_and_with_plain_ends_of_lines(tmp_path):
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nb\rc")
    assert list(read_lines(file)) == [(1, 0, "café\n"), (2, 10, "b\rc")]
    file.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(ConfigError, match="windows.txt, line 2 is not UTF-8"):
        list(read_lines(file))


def content(files):
    source = text_files(files, "file")
    return [source.content(piece) for piece in source.pieces()]


def test_the_hash_is_of_the_contents_in_their_order(folder):
    files = [f"{folder}/a.txt", f"{folder}/b.txt"]
    before = content(files)
    assert content(files[::-1]) != before
    (folder / "a.txt").rename(folder / "z.txt")
    moved = [f"{folder}/z.txt", f"{folder}/b.txt"]
    assert content(moved) == before
    (folder / "z.txt").write_text("fiVe")
    assert content(moved) != before


def test_empty_files_of_rows_are_counted_in_a_line(tmp_path, caplog):
    (tmp_path / "0.csv").touch()
    (tmp_path / "1.csv").write_text("text\na\n")
    (tmp_path / "2.tsv").touch()
    paths = [f"{tmp_path}/*.csv", f"{tmp_path}/2.tsv"]
    assert [dict(row) for _, _, row in file_rows(paths)] == [{"text": "a"}]
    assert caplog.messages == [f"{' '.join(paths)}: 2 of 3 files are empty and skipped"]
    assert list(file_rows([])) == []
    with pytest.raises(ConfigError, match=r"0.csv .*2.tsv: every file is empty: name others"):
        list(file_rows([f"{tmp_path}/0.csv", f"{tmp_path}/2.tsv"]))


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match="a path is empty: name a file or a directory"):
        find_files([""])
