"""Documents, and the pieces that a source of documents is divided into for its tokens."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from lsjax.config import AnyPath

# Number of pieces that large sources are divided into, and limits of a piece's bytes.
MANY_PIECES, SMALLEST_PIECE, LARGEST_PIECE = 4096, 1_000_000, 32_000_000
BLOCK = 1 << 20  # bytes that are hashed at a time


@dataclass(frozen=True)
class Document:
    """A text, or a response and its prompt; or ids of tokens."""

    text: str = ""
    prompt: str = ""
    ids: tuple[int, ...] = ()

    @property
    def key(self) -> int:
        """64-bit hash of the prompt, or of a text without one. Equal texts have equal keys, and so
        do all responses to one prompt."""
        content = (self.prompt or self.text or str(self.ids)).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Piece(NamedTuple):
    """The part of a source whose tokens are one shard."""

    ranges: tuple[tuple[int, int, int], ...]  # index of a file, first byte, and first byte after it
    rows: tuple[int, int] | None = None  # the same of rows, for sources of rows without bytes
    limit: int | None = None  # maximum number of documents


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same on every machine with the same files.

    read: (file, begin, end) -> documents that begin in this range of bytes; with num_rows,
    (None, first, last) -> those of these rows. It raises ConfigError with file and line.
    """

    name: str  # in messages
    files: Sequence[AnyPath]
    read: Callable[[AnyPath | None, int, int | None], Iterator[Document]]
    whole: bool = False  # files are not divided
    num_rows: int | None = None
    part: str = ""  # names the part of the files, if not all are read
    limit: int | None = None  # maximum number of documents
    warnings: tuple[str, ...] = ()  # for when its tokens are made

    def documents(self) -> Iterator[Document]:
        """The first `limit` documents that are not blank."""
        return islice((one for piece in self._pieces() for one in self.in_piece(piece)), self.limit)

    def in_piece(self, piece: Piece) -> Iterator[Document]:
        """The documents of a piece that are not blank."""
        ranges = [(self.files[index], begin, end) for index, begin, end in piece.ranges]
        # Offsets in the text of a .gz file are others than in the file, which is read as a whole.
        ranges = [(file, at, None if file.suffix == ".gz" else end) for file, at, end in ranges]
        if piece.rows is not None:
            ranges = [(None, *piece.rows)]
        found = (document for one in ranges for document in self.read(*one))
        return islice((one for one in found if one.text.strip() or one.ids), piece.limit)

    def stats(self) -> list[tuple[str, int, int]]:
        """Name, size, and time of the last change of each file. Equal ones have equal contents."""
        found = ((file.name, file.stat()) for file in self.files)
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    def content(self, piece: Piece) -> str:
        """Hash (hex) of a piece's bytes."""
        digest = hashlib.sha256()
        for index, begin, end in piece.ranges:
            with self.files[index].open("rb") as file:
                file.seek(begin)
                for at in range(begin, end, BLOCK):
                    digest.update(file.read(min(BLOCK, end - at)))
        return digest.hexdigest()

    def pieces(self) -> list[Piece]:
        """All pieces, of about equal size. They depend on the sizes of the files, and on the
        documents if there is a limit."""
        if self.limit is None:
            return self._pieces()
        left, taken = self.limit, []
        for piece in self._pieces():
            if left:
                taken.append(piece._replace(limit=left))
                left -= sum(1 for _ in self.in_piece(taken[-1]))
        return taken

    def _pieces(self) -> list[Piece]:
        sizes = [file.stat().st_size for file in self.files]
        most = min(max(sum(sizes) // MANY_PIECES, SMALLEST_PIECE), LARGEST_PIECE)
        if self.num_rows is not None:
            count = min(-(-sum(sizes) // most), self.num_rows) or 1
            files = [(index, 0, size) for index, size in enumerate(sizes)]
            ends = [number * self.num_rows // count for number in range(count + 1)]
            rows = enumerate(pairwise(ends))
            return [Piece(tuple(files[number::count]), own) for number, own in rows]
        pieces: list[list[tuple[int, int, int]]] = []
        room = -1  # also an empty file begins the first piece
        for index, (file, size) in enumerate(zip(self.files, sizes, strict=True)):
            parts = 1 if self.whole or file.suffix == ".gz" else max(1, -(-size // most))
            ends = [number * size // parts for number in range(parts + 1)]
            for begin, end in pairwise(ends):
                if end - begin > room or parts > 1:
                    pieces.append([])
                    room = most
                pieces[-1].append((index, begin, end))
                room -= end - begin
        return [Piece(tuple(ranges)) for ranges in pieces]


def is_held_out(key: int | np.ndarray, fraction: float) -> bool | np.ndarray:
    """Whether documents with these keys belong to the validation share.

    Order and number of the documents have no effect. Equal documents are on the same side.
    """
    return key < int(fraction * 2**64)
