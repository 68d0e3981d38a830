"""Rows worked out by hand, and what holds for rows of any documents."""

import numpy as np
import pytest

from lsjax.config import DataConfig
from lsjax.data.packing import OPEN_ROWS, first_fit, from_records, pack, record_type, split

#   a: 1 2 3 4         b: 11 ... 16        c: 21 ... 25      d: 31 32 33
GOLDEN = [[1, 2, 3, 4], [11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25], [31, 32, 33]]


def make(documents, seq_len, prompts=None, dtype=np.uint16, **settings):
    """The rows as they are read, after one of padding, whose record is zeros; and their counts."""
    config, dtype = DataConfig(**dict(too_long="split") | settings), np.dtype(dtype)
    tokens = np.array([token for document in documents for token in document], dtype)
    starts_N1 = np.cumsum([0, *map(len, documents)])
    prompts_N = np.array(prompts or [0] * len(documents), np.int32)
    every = np.arange(len(documents))
    content, counts = pack(tokens, starts_N1, prompts_N, every, seq_len, config)
    layout = record_type(seq_len, dtype)
    records = np.frombuffer(content, layout)
    assert len(records) == counts["rows"]
    batch = from_records(np.concatenate([np.zeros(1, layout), records]))
    for name, array in batch.items():
        assert array.dtype == np.int32
        assert (array[0] == (-1 if name == "labels_BT" else 0)).all()
    return {name: array[1:] for name, array in batch.items()}, counts


def read(rows):
    return {name.removesuffix("_BT"): array.tolist() for name, array in rows[0].items()}


def lost(rows):
    return [rows[1][name] for name in ("documents", "truncated", "dropped")]


def test_split_by_hand():
    rows = make(GOLDEN, 8)
    assert read(rows) == {
        "tokens": [
            [1, 2, 3, 4, 11, 12, 13, 14],
            [15, 16, 21, 22, 23, 24, 25, 31],
            [32, 33, 0, 0, 0, 0, 0, 0],
        ],
        # 14 is followed by 15 and 31 by 32, though in the next row; 4, 16, 25 and 33 by nothing.
        "labels": [
            [2, 3, 4, -1, 12, 13, 14, 15],
            [16, -1, 22, 23, 24, 25, -1, 32],
            [33, -1, -1, -1, -1, -1, -1, -1],
        ],
        "segments": [
            [1, 1, 1, 1, 2, 2, 2, 2],
            [1, 1, 2, 2, 2, 2, 2, 3],
            [1, 1, 0, 0, 0, 0, 0, 0],
        ],
        "positions": [
            [0, 1, 2, 3, 0, 1, 2, 3],
            [0, 1, 0, 1, 2, 3, 4, 0],
            [0, 1, 0, 0, 0, 0, 0, 0],
        ],
    }
    assert (rows[1]["documents"], rows[1]["tokens"]) == (4, 18)


def test_whole_documents_by_hand():
    """a and d share a row, for b and c leave no room for either; prompts are unlabelled."""
    rows = make(GOLDEN, 8, [2, 4, 1, 1], too_long="truncate")
    assert read(rows) == {
        "tokens": [
            [1, 2, 3, 4, 31, 32, 33, 0],
            [11, 12, 13, 14, 15, 16, 0, 0],
            [21, 22, 23, 24, 25, 0, 0, 0],
        ],
        # The last token of a prompt has the first one of the response as its label.
        "labels": [
            [-1, 3, 4, -1, 32, 33, -1, -1],
            [-1, -1, -1, 15, 16, -1, -1, -1],
            [22, 23, 24, 25, -1, -1, -1, -1],
        ],
        "segments": [
            [1, 1, 1, 1, 2, 2, 2, 0],
            [1, 1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
        ],
        "positions": [
            [0, 1, 2, 3, 0, 1, 2, 0],
            [0, 1, 2, 3, 4, 5, 0, 0],
            [0, 1, 2, 3, 4, 0, 0, 0],
        ],
    }
    assert lost(rows)[1:] == [0, 0]


def test_prompts_are_labelled_if_asked_for():
    labels = read(make(GOLDEN, 8, [2, 4, 1, 1], too_long="drop", train_on_prompt=True))
    assert labels["labels"][1] == [12, 13, 14, 15, 16, -1, -1, -1]


def test_too_long_examples_are_truncated_or_dropped_and_counted():
    # In rows of 4: b keeps 15 as the label of its last token, c has only its prompt left.
    rows = make(GOLDEN, 4, [2, 4, 4, 1], too_long="truncate")
    assert read(rows)["tokens"] == [
        [1, 2, 3, 4],
        [11, 12, 13, 14],
        [21, 22, 23, 24],
        [31, 32, 33, 0],
    ]
    assert read(rows)["labels"][1:3] == [[-1, -1, -1, 15], [-1, -1, -1, 25]]
    assert lost(rows) == [4, 2, 0]
    rows = make(GOLDEN, 4, [2, 5, 4, 1], too_long="truncate")
    assert lost(rows) == [3, 1, 1]
    rows = make(GOLDEN, 4, [2, 4, 4, 1], too_long="drop")
    assert read(rows)["tokens"] == [[1, 2, 3, 4], [31, 32, 33, 0]]
    assert lost(rows) == [2, 0, 2]


def test_without_packing_each_document_begins_a_row():
    rows = read(make(GOLDEN, 5, packing=False))
    assert rows["tokens"] == [
        [1, 2, 3, 4, 0],
        [11, 12, 13, 14, 15],
        [16, 0, 0, 0, 0],
        [21, 22, 23, 24, 25],
        [31, 32, 33, 0, 0],
    ]
    assert rows["labels"][1:3] == [[12, 13, 14, 15, 16], [-1] * 5]
    whole = read(make(GOLDEN, 6, packing=False, too_long="drop"))
    assert [row[0] for row in whole["tokens"]] == [1, 11, 21, 31]


def test_first_fit_looks_at_the_newest_rows_only():
    assert first_fit(np.array([6, 5, 3, 4, 2, 1]), 8).tolist() == [0, 1, 1, 2, 0, 2]
    lengths = np.array([7, *[8] * OPEN_ROWS, 1])
    assert first_fit(lengths[1:], 8)[-1] == OPEN_ROWS
    assert first_fit(np.append(lengths[:-2], 1), 8)[-1] == 0
    assert first_fit(lengths, 8)[-1] == OPEN_ROWS + 1  # the first row is closed by then


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("long_documents", ["split", "truncate", "drop"])
def test_rows_hold_the_documents_and_nothing_leaks(seed, packing, long_documents, monkeypatch):
    """Token number n is n + 1, so a token tells where it is from. Few rows are laid out at once."""
    monkeypatch.setattr("lsjax.data.packing.ROWS", 7)
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 30, draw.integers(2, 60))
    prompts = (draw.random(len(lengths)) * lengths).astype(int) if seed % 2 else 0 * lengths
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]
    settings = dict(packing=packing, too_long=long_documents)
    batch, large = (
        make(documents, 11, prompts.tolist(), dtype, **settings)[0]
        for dtype in (np.uint16, np.uint32)
    )
    for name, array in batch.items():
        np.testing.assert_array_equal(large[name], array)
    document_of = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    labelled, seen = [], []
    for tokens, labels, segments, positions in zip(*batch.values(), strict=True):
        assert (np.diff(segments) <= 1).all() and segments[0] == 1
        for number in range(1, segments.max() + 1):
            inside = segments == number
            piece = tokens[inside]
            assert len(set(document_of[piece - 1])) == 1, "two documents in one segment"
            assert (np.diff(piece) == 1).all() and np.array_equal(
                positions[inside], range(len(piece))
            )
            document = document_of[piece[0] - 1]
            first_label = documents[document][0] + prompts[document]
            for token, label in zip(piece, labels[inside], strict=True):
                follows = token + 1 <= ends[document] and token + 1 >= first_label
                assert label == (token + 1 if follows else -1)
            seen += piece.tolist()
            labelled += labels[inside][labels[inside] >= 0].tolist()
        padding = segments == 0
        assert not tokens[padding].any() and (labels[padding] == -1).all()
        assert packing or segments.max() == 1
    assert len(set(seen)) == len(seen) and len(set(labelled)) == len(labelled)
    if long_documents == "split":
        assert sorted(seen) == list(range(1, ends[-1] + 1)), "a token was lost"
        # Every token is predicted once, but prompts and the first of each document.
        first = {d[0] for d in documents}
        free = {t for d, p in zip(documents, prompts, strict=True) for t in d[p:]}
        assert sorted(labelled) == sorted(free - first)


def test_split_gives_pieces_of_every_document():
    which, offset, length, row = split(np.array([3, 9, 1]), 4, True)
    assert which.tolist() == [0, 1, 1, 1, 2]
    assert offset.tolist() == [0, 0, 1, 5, 0]
    assert length.tolist() == [3, 1, 4, 4, 1]
    assert row.tolist() == [0, 0, 1, 2, 3]


def test_no_document_makes_no_row():
    for long_documents in ("split", "drop"):
        assert make([], 8, too_long=long_documents)[1]["rows"] == 0
