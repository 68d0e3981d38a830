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

from typing import TypedDict

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from lsjax.config import DataConfig

OPEN_ROWS = 1024  # number of newest rows that first-fit searches
ROWS = 256  # that are laid out at a time


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


def pack(
    tokens: np.ndarray,
    starts_N1: Int64[np.ndarray, " N1"],
    prompts_N: Int32[np.ndarray, "N"],
    documents_M: Int64[np.ndarray, "M"],
    seq_len: int,
    config: DataConfig,
) -> tuple[bytes, dict[str, int]]:
    """Packs some documents in this order; drops those without labels or truncated to a prompt.

    Document n is tokens[starts_N1[n] : starts_N1[n + 1]]; prompts_N of its tokens are the prompt.

    Returns the records of the rows. Also returns the numbers of rows, of tokens without padding, of
    documents in the rows, and of documents that were truncated or dropped.
    """
    if config.train_on_prompt:
        prompts_N = np.zeros_like(prompts_N)
    lengths_M, prompts_M = np.diff(starts_N1)[documents_M], prompts_N[documents_M]
    truncated = dropped = 0
    if config.long_documents == "split":
        which_P, offset_P, length_P, row_P = split(lengths_M, seq_len, config.packing)
    else:
        keep_M = (lengths_M >= 2) & (prompts_M < lengths_M) & (prompts_M <= seq_len)
        long_M = lengths_M > seq_len
        if config.long_documents == "drop":
            keep_M &= ~long_M
        truncated, dropped = int((keep_M & long_M).sum()), int((~keep_M).sum())
        which_P = np.flatnonzero(keep_M)
        length_P = np.minimum(lengths_M[which_P], seq_len)
        offset_P = np.zeros_like(which_P)
        row_P = first_fit(length_P, seq_len) if config.packing else np.arange(len(which_P))
    pieces_3P = np.stack([row_P, starts_N1[documents_M[which_P]] + offset_P, length_P])
    pieces_3P = pieces_3P[:, np.argsort(row_P, kind="stable")]
    # A prompt's last token has the response's first as its label; a document's last token has none.
    labelled = np.ones(len(tokens), bool)
    for start, end, prompt in zip(starts_N1[:-1], starts_N1[1:], prompts_N, strict=True):
        labelled[start : start + max(prompt - 1, 0)] = False
        labelled[end - 1 : end] = False
    rows, records = int(row_P.max(initial=-1)) + 1, []
    for row in range(0, rows, ROWS):
        own = slice(*np.searchsorted(pieces_3P[0], (row, row + ROWS)))
        records.append(_records(tokens, labelled, seq_len, pieces_3P[:, own]).tobytes())
    return b"".join(records), {
        "rows": rows,
        "tokens": int(length_P.sum()),
        "documents": len(np.unique(which_P)),
        "truncated": truncated,
        "dropped": dropped,
    }


def _records(
    tokens: np.ndarray, labelled: np.ndarray, seq_len: int, pieces_3P: Int64[np.ndarray, "3 P"]
) -> Shaped[np.ndarray, "B"]:
    """Records of rows with these pieces. labelled: whether the token after each is a label."""
    row_P, start_P, length_P = pieces_3P
    lengths_B = np.bincount(row_P - row_P[0], length_P)
    inside_BT = np.arange(seq_len) < lengths_B[:, None]
    piece_N = np.repeat(np.arange(len(length_P)), length_P)
    begins_BT, place_BT = np.zeros_like(inside_BT), np.zeros(inside_BT.shape, np.int64)
    begins_BT[inside_BT] = np.diff(piece_N, prepend=-1) > 0
    shift_P = start_P + length_P - np.cumsum(length_P)
    place_BT[inside_BT] = np.arange(len(piece_N)) + shift_P[piece_N]
    labelled_BT = labelled[place_BT] & inside_BT
    next_B = tokens[place_BT[:, -1] + labelled_BT[:, -1]] * labelled_BT[:, -1]
    records = np.empty(len(lengths_B), record_type(seq_len, tokens.dtype))
    records["length"] = lengths_B
    records["begins"] = np.packbits(begins_BT, axis=1)
    records["labelled"] = np.packbits(labelled_BT, axis=1)
    records["ids"] = np.column_stack([tokens[place_BT] * inside_BT, next_B])
    return records


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


def record_type(seq_len: int, dtype: np.dtype) -> np.dtype:
    """Layout of a record with ids of this type."""
    bits = np.uint8, (-(-seq_len // 8),)
    fields = [("length", np.uint32), ("begins", *bits), ("labelled", *bits)]
    return np.dtype([*fields, ("ids", dtype, (seq_len + 1,))])


def from_records(records: Shaped[np.ndarray, "B"]) -> PackedBatch:
    """Rows from their records; a record of zeros is a row of padding."""
    ids = records["ids"].astype(np.int32)
    at_T = np.arange(ids.shape[1] - 1, dtype=np.int32)
    begins_BT, labelled_BT = (
        np.unpackbits(records[name], axis=1, count=len(at_T)) for name in ("begins", "labelled")
    )
    inside_BT = at_T < records["length"][:, None]
    first_BT = np.maximum.accumulate(np.where(begins_BT, at_T, 0), axis=1)
    return PackedBatch(
        tokens_BT=ids[:, :-1],
        labels_BT=np.where(labelled_BT, ids[:, 1:], np.int32(-1)),
        segments_BT=np.cumsum(begins_BT, axis=1, dtype=np.int32) * inside_BT,
        positions_BT=(at_T - first_BT) * inside_BT,
    )
