"""Which documents are for training and which for validation.

A document is held out if the hash of its content says so: the choice depends neither on the order
of the documents nor on their number, and equal documents are on the same side.
"""

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from lsjax.config import check
from lsjax.data.documents import Document

SPLITS = ("train", "validation")


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is in the share that is kept for validation."""
    return document.key < int(fraction * 2**64)


def held_out(keys_N: UInt64[np.ndarray, "N"], fraction: float) -> Bool[np.ndarray, "N"]:
    """The same for the keys of many documents."""
    return keys_N < np.uint64(int(fraction * 2**64))


def choose(
    keys_N: UInt64[np.ndarray, "N"], chosen_N: Bool[np.ndarray, "N"]
) -> Int64[np.ndarray, "M"]:
    """Numbers of the chosen documents, in the order of their keys.

    That order is as good as random and does not change where files are renamed: documents beside
    one another in a file are not so in the rows, and the first rows are a sample of all.
    """
    numbers = np.flatnonzero(chosen_N)
    return numbers[np.argsort(keys_N[numbers], kind="stable")]


def check_split(split: str) -> None:
    """Raises ConfigError for a name that is no split."""
    check(split in SPLITS, f"split {split!r} is unknown: choose {' or '.join(SPLITS)}")
