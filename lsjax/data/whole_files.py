"""Files that are there whole or not at all, also where several processes write the same one."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file under another name first, and then renames it."""
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes the given name when the block has ended well.

    If another process has finished the same one by then, that one stays.
    """
    partial = _partial(directory)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".partial-{uuid.uuid4().hex}")
