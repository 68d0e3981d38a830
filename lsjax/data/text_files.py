"""Files of plain text, and the patterns that name them."""

import glob
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lsjax.config import ConfigError, check
from lsjax.data.documents import Document, Source


class TextFiles(Source):
    """Documents of plain text.

    Args:
      paths: files or patterns, as for `find_files`.
      separator: "file" makes each file a document, "blank_line" ends one at each run of blank
        lines; anything else is a marker that stands between documents.
    """

    def __init__(self, paths: Sequence[str], separator: str = "file"):
        self.files, self.name = find_files(paths), " ".join(paths)
        self._separator = separator

    def documents(self) -> Iterator[Document]:
        """The documents of each file in turn; separators are no part of them."""
        for file in self.files:
            text = read_text(file)
            match self._separator:
                case "file":
                    pieces = [text]
                case "blank_line":
                    pieces = re.split(r"\n(?:[^\S\n]*\n)+", text)
                case marker:
                    pieces = text.split(marker)
            yield from (Document(piece) for piece in pieces if piece.strip())


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns (*, ?, [...], ** for directories) name.

    Those of a pattern are sorted; the patterns keep their order. No file comes twice.

    Raises ConfigError for a path or pattern that names none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        expanded = str(Path(path).expanduser())
        literal = Path(expanded)
        names = [expanded] if literal.exists() else sorted(glob.glob(expanded, recursive=True))
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        files = [file for file in map(Path, names) if file.is_file()]
        check(bool(files), f"no file matches {path}: check paths and the directory you are in")
        found |= dict.fromkeys(files)
    return list(found)


def read_text(file: Path) -> str:
    """A file's text, without a byte order mark and with \\n as the end of lines.

    Raises ConfigError with file and line for what is not UTF-8.
    """
    return "".join(line for _, line in read_lines(file))


def stop_at(error: ConfigError) -> None:
    """What is done about a bad line unless told otherwise."""
    raise error


def read_lines(
    file: Path, refuse: Callable[[ConfigError], None] = stop_at
) -> Iterator[tuple[int, str]]:
    """The same line by line, with the lines' numbers and their ends; a .gz file is unpacked.

    refuse: called with the error of a line that can't be read; if it returns, the line is left out.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    refuse(
                        ConfigError(f"{file}, line {number} is not UTF-8 text: save it as UTF-8")
                    )
                    continue
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{file} can't be unpacked ({error}): get it again") from None
