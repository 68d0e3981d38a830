"""Documents in one order, with a hash of what they are read from: text files, Python's source."""

import glob
import gzip
import hashlib
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsjax.config import ConfigError, check

# Tests are repetitive; packages are whatever was installed; the rest belongs to one machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Document:
    """A text, or a response with the prompt before it."""

    text: str
    prompt: str = ""

    @property
    def key(self) -> int:
        """64 bits of a hash of the prompt, or of a text without one: equal texts have equal keys,
        and so have all responses to one prompt."""
        content = (self.prompt or self.text).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Source:
    """Documents in one order, the same on every machine that has the same files.

    name: its name in messages. files: the files behind it. read: yields the documents, and raises
    ConfigError with file and line where it can't. part: which part of the files it reads, if not
    all.
    """

    name: str
    files: Sequence[Path]
    read: Callable[[], Iterator[Document]]
    part: str = ""

    def documents(self) -> Iterator[Document]:
        """All documents but those whose text is blank."""
        return (document for document in self.read() if document.text.strip())

    def fingerprint(self) -> str:
        """Hash (hex) of the contents of the files in their order, but not of their names."""
        whole = hashlib.sha256(self.part.encode())
        for path in self.files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)


def python_source() -> Source:
    """Text that every machine has: the standard library of the Python that runs this.

    Each module is a document, in the order of their paths; bytes that are not UTF-8 are replaced.
    """
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # not walked into
        own = (name for name in names if not name.startswith(OF_ONE_MACHINE))
        found += [Path(folder, name) for name in own if name.endswith(".py")]
    check(
        bool(found),
        f"{root} has no .py files: this Python comes without its source, choose --data.source",
    )
    files = sorted(found, key=Path.as_posix)

    def read() -> Iterator[Document]:
        return (Document(file.read_text(encoding="utf-8", errors="replace")) for file in files)

    return Source(f"standard library of Python {platform.python_version()}", files, read)


def text_files(paths: Sequence[str], separator: str) -> Source:
    """Documents of plain text; separators are no part of them.

    paths: files or patterns, as for `find_files`.
    separator: "file" makes each file a document, "blank_line" ends one at each run of blank lines;
      anything else is a marker that stands between documents.
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


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns (*, ?, [...], ** for directories) name.

    Those of a pattern are sorted; the patterns keep their order. No file comes twice.

    Raises ConfigError for a path or pattern that names none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        literal = Path(path).expanduser()
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        # An existing path is itself, even if it looks like a pattern.
        matches = [literal] if literal.exists() else sorted(glob.glob(str(literal), recursive=True))
        files = [file for file in map(Path, matches) if file.is_file()]
        check(bool(files), f"no file matches {path}: check paths and the directory you are in")
        found |= dict.fromkeys(files)
    return list(found)


def stop_at(error: ConfigError) -> None:
    """Raises the error of a bad line: the default of every `refuse`."""
    raise error


def read_lines(
    file: Path, refuse: Callable[[ConfigError], None] = stop_at
) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines of a UTF-8 file; a .gz file is unpacked.

    A byte order mark is left out, and lines end with \\n.

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
