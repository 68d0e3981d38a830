"""Files are whole or not there, whoever else writes them."""

import errno
import os

import pytest

from lsjax.config import as_path
from lsjax.io.files import whole_directory, write_whole, writing


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "store") as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_first_to_finish_stays_and_the_other_leaves_nothing(tmp_path):
    with whole_directory(tmp_path / "store") as slow:
        (slow / "by").write_text("slow")
        with whole_directory(tmp_path / "store") as quick:
            (quick / "by").write_text("quick")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert (tmp_path / "store" / "by").read_text() == "quick"


def test_files_are_replaced(tmp_path):
    for content in (b"one", b"two"):
        write_whole(tmp_path / "deep" / "file", content)
    assert [path.read_bytes() for path in (tmp_path / "deep").iterdir()] == [b"two"]


def test_a_file_that_can_not_be_written_is_named_and_not_its_partial_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        write_whole(tmp_path / "file" / "inside", b"x")
    assert str(error.value).startswith(f"{tmp_path}/file/inside can't be written (")
    assert ".partial" not in str(error.value)


def test_the_outermost_name_counts_and_other_messages_stay():
    with pytest.raises(OSError) as error, writing(as_path("out")), writing(as_path("out/part")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(error.value).startswith("out can't be written (No space left on device): free")
    with pytest.raises(FileNotFoundError, match="^no such bucket$"), writing(as_path("out")):
        raise FileNotFoundError("no such bucket")
