"""What a source gives: documents, in one order, and a hash of all that they are made from."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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


class Source(ABC):
    """Documents in one order, the same on every machine that has the same files.

    Attributes:
      name: what to call it in messages.
      files: the files behind it.
    """

    name: str
    files: list[Path]

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents that hold anything but white space.

        Raises ConfigError, with file and line, for what cannot be read.
        """

    def fingerprint(self) -> str:
        """Hash (hex) of the contents of the files in their order, not of where they lie."""
        whole = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)
