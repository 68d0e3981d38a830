"""Files are whole or not there, whoever else writes them."""

import pytest

from lsjax.data.files import whole_directory, write_whole


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
