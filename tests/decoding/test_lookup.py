"""Drafts from the text itself."""

import jax
import numpy as np
import pytest

from lsjax.decoding.auto import lookup
from lsjax.decoding.auto.lookup import LONGEST

look_up = jax.jit(lookup.look_up, static_argnums=2)


def by_loops(text: list[int], steps: int) -> tuple[int, list[int]]:
    """Tries every earlier place, from the last to the first."""
    best, at = 0, len(text) - 1
    for place in reversed(range(len(text) - 1)):
        size = 0
        while size < min(LONGEST, place + 1) and text[place - size] == text[-1 - size]:
            size += 1
        if size > best:
            best, at = size, place
    followed = text[at + 1 :] * steps
    return best, followed[:steps]


@pytest.mark.parametrize("vocab", [2, 3, 20])
def test_the_longest_match_as_by_loops(vocab):
    """Random texts of many lengths as rows of one batch; what lies behind them is not read."""
    random, steps = np.random.default_rng(vocab), 6
    tokens_BS = random.integers(0, vocab, (60, 40))
    length_B = random.integers(1, 41, 60)
    matched_B, proposal_BT = look_up(tokens_BS, length_B, steps)
    matched_B, proposal_BT = np.asarray(matched_B), np.asarray(proposal_BT)
    sizes = set()
    for row, length in enumerate(length_B):
        matched, followed = by_loops(tokens_BS[row, :length].tolist(), steps)
        assert matched_B[row] == matched
        assert matched == 0 or proposal_BT[row].tolist() == followed
        sizes.add(matched)
    assert {0, LONGEST} <= sizes or vocab > 2 and 0 in sizes


def test_a_text_by_hand():
    """The last match of the longest ones; a draft that reaches the end goes on from its start."""
    text = [1, 2, 3, 4, 1, 2, 5, 9, 1, 2]
    matched_B, proposal_BT = look_up(np.array([text + [0, 0]]), np.array([10]), 6)
    assert matched_B.tolist() == [2] and proposal_BT.tolist() == [[5, 9, 1, 2, 5, 9]]
