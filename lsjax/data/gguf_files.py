"""GGUF files: the parts of a split one, and the gguf package's reader."""

import re
from typing import Any

import numpy as np

from lsjax.config import Path
from lsjax.data.files import one_line


def gguf_parts(file: Path) -> list[Path]:
    """All files of a split GGUF, named NAME-00001-of-00003.gguf; the file itself if not split."""
    part = re.fullmatch(r"(.+-)\d{5}(-of-(?!0{5})(\d{5})\.gguf)", file.name)
    if part is None:
        return [file]
    name, of, count = part.groups()
    return [file.with_name(f"{name}{number:05d}{of}") for number in range(1, int(count) + 1)]


def open_gguf(file: Path, error_type: type[ValueError]) -> Any:
    """The gguf package's reader for a file.

    Raises `error_type` if the package is not installed. Also raises it unless the file is a
    complete little-endian GGUF of version 2 or 3.
    """
    try:
        import gguf
    except ImportError as error:
        raise error_type(
            f"{file}: reading GGUF files needs the gguf package: pip install 'lsjax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """Raises at slices past the file's end: gguf shortens them, and loops on huge counts."""

        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                size = int(count) * np.dtype(dtype).itemsize
                raise ValueError(f"{size} bytes at {offset} exceed its {len(self.data)} bytes")
            return values

    try:
        reader = Reader(file)
    except OSError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise error_type(
            f"{file}: not a complete GGUF file ({problem}): damaged or cut off, download it again"
        ) from error
    if reader.byte_order == "S":
        raise error_type(f"{file}: is a big-endian GGUF: use a little-endian one")
    return reader
