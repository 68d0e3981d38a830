"""A text file that grows line by line, on a disk or in a bucket."""

import io
import time
from typing import IO

from lsjax.config import AnyPath, in_bucket
from lsjax.io.files import write_whole, writing

PAUSE = 60.0  # seconds between two writes of a growing file in a bucket


class Lines:
    """A text file that grows line by line. Raises an OSError that names the file if it can't be
    written.

    A file in a bucket can only be written as a whole. This happens at most once a minute, and at
    `flush` and `close`.
    """

    def __init__(self, file: AnyPath, *, empty: bool = False):
        """empty: whether to empty an existing file, instead of appending to it."""
        self._file, self._written = file, time.monotonic()
        if in_bucket(file):
            known = file.exists() and not empty
            self._text: IO[str] = io.StringIO()
            self._text.write(file.read_text() if known else "")
        else:
            with writing(file):
                self._text = file.open("w" if empty else "a", encoding="utf-8")

    def write(self, line: str) -> None:
        """Appends a line; a local file has it at once."""
        with writing(self._file):
            self._text.write(line)
        if not in_bucket(self._file) or time.monotonic() - self._written > PAUSE:
            self.flush()

    def flush(self) -> None:
        """Writes every line."""
        with writing(self._file):
            self._text.flush()
        if in_bucket(self._file):
            write_whole(self._file, self._text.getvalue().encode())
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes every line and closes the file."""
        if in_bucket(self._file):
            self.flush()
        with writing(self._file):
            self._text.close()
