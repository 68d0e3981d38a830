"""Records of fixed size in files of a directory, read by number on a disk or in a bucket."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, Shaped

from lsjax.config import AnyPath, in_bucket


@dataclass(frozen=True, eq=False)
class Records:
    """Records in the files 000000.SUFFIX, 000001.SUFFIX, ... of a directory.

    layout: of a record. rows_S: number of records in each file.
    """

    directory: AnyPath
    suffix: str
    layout: np.dtype
    rows_S: Int64[np.ndarray, "S"]
    _mapped: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.rows_S.sum())

    def file(self, number: int) -> AnyPath:
        """A file by number."""
        return self.directory / f"{number:06d}.{self.suffix}"

    def read(self, numbers: np.ndarray) -> Shaped[np.ndarray, "B"]:
        """Records by number; number -1 is a record of zeros."""
        found, given = np.zeros(len(numbers), self.layout), np.flatnonzero(numbers >= 0)
        ends_S = np.cumsum(self.rows_S)
        files = np.searchsorted(ends_S, numbers[given], side="right")
        places = numbers[given] - ends_S[files] + self.rows_S[files]
        if in_bucket(self.directory):
            from lsjax.config.buckets import file_system

            names = [str(self.file(number)) for number in files.tolist()]
            begins = places * self.layout.itemsize
            parts = file_system().cat_ranges(names, begins, begins + self.layout.itemsize)
            found[given] = np.frombuffer(b"".join(parts), self.layout)
        else:
            for b, number, place in zip(given, files.tolist(), places, strict=True):
                if number not in self._mapped:
                    self._mapped[number] = np.memmap(self.file(number), self.layout, "r")
                found[b] = self._mapped[number][place]
        return found
