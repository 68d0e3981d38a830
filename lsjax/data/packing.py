"""Packs documents of any length into rows of equal length.

                 row 0                     row 1                      row 2
    split        a a a a b b b b | b b c c c c c d | d d . . . . . .    all rows full but the last
    first-fit    a a a a d d d . | b b b b b b . . | c c c c c . . .    documents stay intact

A row is a list of pieces; a piece is a contiguous span of one document. On disk a row is a record
of fixed size:

    uint32     number of tokens, without padding
    T bits     whether a piece of a document begins here
    T bits     whether the next token is a label
    T + 1 ids  uint16 or uint32; the last one is the label of the last token
"""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from lsjax.config import DataConfig

OPEN_ROWS = 1024  # number of newest rows that first-fit searches


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of N documents: document n is tokens[starts_N1[n] : starts_N1[n + 1]].

    prompts_N: prompt tokens of each document.
    """

    tokens: np.ndarray
    starts_N1: Int64[np.ndarray, "N+1"]
    prompts_N: Int32[np.ndarray, "N"]


class PackedBatch(TypedDict):
    """Rows of one host, [B, T] each; a plain dict of numpy arrays.

    tokens_BT: ids; 0 in padding.
    labels_BT: the document's next token, even if it falls in the next row. -1 in prompts
      (finetuning), at a document's last token, and in padding.
    segments_BT: number of the document within the row, from 1; 0 in padding.
    positions_BT: position within the piece, from 0; 0 in padding.
    """

    tokens_BT: Int32[np.ndarray, "B T"]
    labels_BT: Int32[np.ndarray, "B T"]
    segments_BT: Int32[np.ndarray, "B T"]
    positions_BT: Int32[np.ndarray, "B T"]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of seq_len tokens: row r has the pieces first_R1[r] .. first_R1[r + 1] - 1.

    start_P, length_P: span of each piece in store.tokens. document_P: its document.
    num_documents, num_truncated, num_dropped: documents in the rows, those of them that were
    truncated, and dropped.
    """

    store: TokenStore
    seq_len: int
    train_on_prompt: bool
    first_R1: Int64[np.ndarray, "R+1"]
    start_P: Int64[np.ndarray, "P"]
    length_P: Int64[np.ndarray, "P"]
    document_P: Int64[np.ndarray, "P"]
    num_documents: int
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.first_R1) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, without padding."""
        return int(self.length_P.sum())

    def records(self, rows: np.ndarray) -> UInt8[np.ndarray, "B bytes"]:
        """Records of rows, by number."""
        tokens, starts = self.store.tokens, self.store.starts_N1
        lengths = np.zeros((len(rows), 1), np.uint32)
        begins, labelled = np.zeros((2, len(rows), self.seq_len), bool)
        ids = np.zeros((len(rows), self.seq_len + 1), tokens.dtype)
        for b, row in enumerate(rows):
            to = 0
            for piece in range(self.first_R1[row], self.first_R1[row + 1]):
                start, length = int(self.start_P[piece]), int(self.length_P[piece])
                document = self.document_P[piece]
                at, to = to, to + length
                begins[b, at] = True
                ids[b, at:to] = tokens[start : start + length]
                # Labels are the following tokens, starting at the response's first token.
                prompt = 0 if self.train_on_prompt else int(self.store.prompts_N[document])
                first = max(start + 1, int(starts[document]) + prompt)
                last = min(start + length + 1, int(starts[document + 1]))
                labelled[b, first + at - start - 1 : last + at - start - 1] = True
            lengths[b] = to
            if labelled[b, -1]:
                ids[b, -1] = tokens[last - 1]
        bits = (np.packbits(one, axis=1) for one in (begins, labelled))
        return np.concatenate([lengths.view(np.uint8), *bits, ids.view(np.uint8)], axis=1)


def pack(
    store: TokenStore, documents_M: Int64[np.ndarray, "M"], seq_len: int, config: DataConfig
) -> PackedRows:
    """Packs these documents in this order; drops those without labels or truncated to a prompt."""
    lengths_M = np.diff(store.starts_N1)[documents_M]
    truncated = dropped = 0
    if config.long_documents == "split":
        which_P, offset_P, length_P, row_P = split(lengths_M, seq_len, config.packing)
    else:
        prompts_M = 0 if config.train_on_prompt else store.prompts_N[documents_M]
        keep_M = (lengths_M >= 2) & (prompts_M < lengths_M) & (prompts_M <= seq_len)
        long_M = lengths_M > seq_len
        if config.long_documents == "drop":
            keep_M &= ~long_M
        truncated, dropped = int((keep_M & long_M).sum()), int((~keep_M).sum())
        which_P = np.flatnonzero(keep_M)
        length_P = np.minimum(lengths_M[which_P], seq_len)
        offset_P = np.zeros_like(which_P)
        row_P = first_fit(length_P, seq_len) if config.packing else np.arange(len(which_P))
    order = np.argsort(row_P, kind="stable")
    document_P = documents_M[which_P[order]]
    return PackedRows(
        store=store,
        seq_len=seq_len,
        train_on_prompt=config.train_on_prompt,
        first_R1=np.searchsorted(row_P[order], np.arange(row_P.max(initial=-1) + 2)),
        start_P=store.starts_N1[document_P] + offset_P[order],
        length_P=length_P[order],
        document_P=document_P,
        num_documents=len(np.unique(which_P)),
        num_truncated=truncated,
        num_dropped=dropped,
    )


def split(
    lengths_M: Int64[np.ndarray, "M"], seq_len: int, packing: bool
) -> tuple[Int64[np.ndarray, "P"], ...]:
    """Cuts documents at row ends. They are laid end to end, or each starts a row.

    Returns each piece's document (an index into lengths_M), offset in it, length and row.
    """
    room_M = lengths_M if packing else -(-lengths_M // seq_len) * seq_len
    ends_M = np.cumsum(room_M)
    begins_M = ends_M - room_M
    total = room_M.sum()
    cut_P = np.union1d(begins_M[lengths_M > 0], np.arange(0, total, seq_len))
    which_P = np.searchsorted(begins_M, cut_P, side="right") - 1
    offset_P = cut_P - begins_M[which_P]
    next_P = np.append(cut_P[1:], total)
    length_P = np.minimum(next_P - cut_P, lengths_M[which_P] - offset_P)
    return which_P, offset_P, length_P, cut_P // seq_len


def first_fit(lengths_P: Int64[np.ndarray, "P"], seq_len: int) -> Int64[np.ndarray, "P"]:
    """Row of each document: the first of the newest OPEN_ROWS with room, else a new one."""
    row_P = np.empty(len(lengths_P), np.int64)
    room = np.zeros(len(lengths_P), np.int64)  # free space; one row per document at most
    rows = 0
    for number, length in enumerate(lengths_P):
        low = max(0, rows - OPEN_ROWS)
        fits = room[low:rows] >= length
        row = low + int(fits.argmax()) if fits.any() else rows
        if row == rows:
            room[row], rows = seq_len, rows + 1
        room[row] -= length
        row_P[number] = row
    return row_P


def record_bytes(seq_len: int, dtype: np.dtype) -> int:
    """Size of a record."""
    return 4 + 2 * -(-seq_len // 8) + (seq_len + 1) * dtype.itemsize


def from_records(
    records: UInt8[np.ndarray, "B bytes"], seq_len: int, dtype: np.dtype
) -> PackedBatch:
    """Rows from their records; a record of zeros is a row of padding."""
    begin, bits = 4, -(-seq_len // 8)
    length_B1 = np.ascontiguousarray(records[:, :begin]).view(np.uint32)
    flags = [
        np.unpackbits(records[:, at : at + bits], axis=1, count=seq_len)
        for at in (begin, begin + bits)
    ]
    ids = np.ascontiguousarray(records[:, begin + 2 * bits :]).view(dtype).astype(np.int32)
    at_T = np.arange(seq_len, dtype=np.int32)
    inside = at_T < length_B1
    first = np.maximum.accumulate(np.where(flags[0], at_T, 0), axis=1)
    return PackedBatch(
        tokens_BT=ids[:, :-1],
        labels_BT=np.where(flags[1], ids[:, 1:], np.int32(-1)),
        segments_BT=np.cumsum(flags[0], axis=1, dtype=np.int32) * inside,
        positions_BT=(at_T - first) * inside,
    )
