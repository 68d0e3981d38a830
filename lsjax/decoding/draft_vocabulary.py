"""Tokens that may be drafted: a draft's head is then cheaper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from lsjax.config import check
from lsjax.data.token_counts import most_frequent
from lsjax.model.int8 import Int8Rows
from lsjax.model.protocol import DecoderModel, Sizes


class DraftHead(NamedTuple):
    """The head's rows of the W tokens that may be drafted. places_V: index of each token among
    them, or W if it may not be drafted."""

    ids_W: Int[Array, " W"]
    places_V: Int[Array, " V"]
    rows: Any  # [W, ...], by the model's `head_rows`


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids that may be drafted, in ascending order: of equal logits the lower id wins.

    The head costs as much as several layers, and W rows of it less than V. The verification uses
    the full head, so the text stays the same. is_int8: whether the rows are rounded to int8, which
    halves the bytes of bfloat16 (lsjax/model/int8.py).
    """

    ids_W: Int[np.ndarray, " W"]
    is_int8: bool = False

    def __len__(self) -> int:
        return len(self.ids_W)

    @classmethod
    def most_frequent(
        cls, counts: Mapping[int, int], size: int, vocab_size: int
    ) -> "DraftVocabulary":
        """The `size` most frequent tokens (lsjax/data/token_counts.py). Raises ConfigError for a
        size that is not in 1..vocab_size - 1."""
        _check_size(size, vocab_size)
        return cls(most_frequent(counts, size))

    @classmethod
    def every(cls, vocab_size: int) -> "DraftVocabulary":
        """All tokens, with rows of int8."""
        return cls(np.arange(vocab_size, dtype=np.int32), is_int8=True)

    def validate(self, sizes: Sizes) -> None:
        """Raises ConfigError if the model lacks some of the tokens, or if neither their number nor
        rounding makes the head smaller."""
        _check_size(len(self), sizes.vocab_size + self.is_int8)
        check(bool((np.diff(self.ids_W) > 0).all()), "draft vocabulary ids must ascend: sort them")
        check(
            bool(0 <= self.ids_W[0] and self.ids_W[-1] < sizes.vocab_size),
            f"the draft vocabulary has ids {self.ids_W[0]}..{self.ids_W[-1]}, the model "
            f"0..{sizes.vocab_size - 1}: count the tokens with the model's own tokenizer",
        )

    def head(self, model: DecoderModel) -> DraftHead:
        """The rows of the model's head for these tokens."""
        places_V = np.full(model.vocab_size, len(self), np.int32)
        places_V[self.ids_W] = np.arange(len(self))
        ids_W, places_V = jax.device_put((self.ids_W, places_V))
        rows = model.head_rows(self.ids_W)
        if self.is_int8 and not isinstance(rows, Int8Rows):
            rows = jax.jit(Int8Rows.of)(rows)
        return DraftHead(ids_W, places_V, rows)


def _check_size(size: int, vocab_size: int) -> None:
    check(size >= 1, f"a draft vocabulary of {size} is empty: choose --draft-vocab 1 or more")
    check(
        size < vocab_size,
        f"a draft vocabulary of {size} does not make the head of {vocab_size} smaller: choose a "
        "smaller --draft-vocab, or none",
    )
