"""A file that grows line by line, and a disk that is full."""

from contextlib import suppress

import pytest

from lsjax.config import as_path
from lsjax.io.lines import Lines

FULL = r"/dev/full can't be written \(No space left on device\): free space there, or choose"


def test_a_line_is_in_the_file_at_once_and_an_old_file_is_kept_or_emptied(tmp_path):
    file = tmp_path / "lines.txt"
    for empty, expected in ((False, "one\n"), (False, "one\none\n"), (True, "one\n")):
        lines = Lines(file, empty=empty)
        lines.write("one\n")
        assert file.read_text() == expected
        lines.close()


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_names_the_file(length):
    lines = Lines(as_path("/dev/full"))
    with pytest.raises(OSError, match=FULL):
        lines.write("x" * length)
    with suppress(OSError):
        lines.close()
    lines.close()  # closed: the interpreter has nothing left to fail at


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"lines.txt can't be written \(No such file or directory\)"):
        Lines(tmp_path / "nowhere" / "lines.txt")
