"""Counts of drafts by exit and position."""

import numpy as np
import pytest

import lsjax
from lsjax.evaluation.acceptance import Acceptance

ANSWERS = [
    dict(id="a", exit_layer=4, drafted_by_position=[5, 3], accepted_by_position=[4, 1]),
    dict(id="a", exit_layer=2, drafted_by_position=[6], accepted_by_position=[0]),
    dict(id="b", exit_layer=4, drafted_by_position=[1], accepted_by_position=[1]),
]


def test_counts_by_hand():
    """Shorter drafts count as zeros; an exit without a text too."""
    found = Acceptance.of(ANSWERS)
    assert found.exits == (2, 4) and found.drafted_nEJ.shape == (2, 2, 2)
    np.testing.assert_array_equal(found.drafted_EJ, [[6, 0], [6, 3]])
    np.testing.assert_array_equal(found.accepted_EJ, [[0, 0], [5, 1]])
    np.testing.assert_allclose(found.rate_EJ, [[0, np.nan], [5 / 6, 1 / 3]])
    assert found.estimate(4, 0).value == pytest.approx(5 / 6) and found.estimate(4, 0).count == 2


def test_counts_are_those_of_single_texts(model, tokenizer):
    """The rounds of each text, counted token by token from its trace."""
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    found = lsjax.acceptance(model, tokenizer, prompts, (1, 2), 3, max_new_tokens=12)
    engine = lsjax.Engine(model, tokenizer)
    for e, exit_layer in enumerate((1, 2)):
        engine.use(lsjax.SelfSpeculative(exit_layer, 3))
        for n, done in enumerate(engine.generate(prompts, max_new_tokens=12)):
            drafted, accepted, run = np.zeros(3, int), np.zeros(3, int), 0
            for token in range(1, len(done.trace)):
                run += done.trace.accepted_n[token]
                if rounds := done.trace.round_n[token]:
                    drafted[: rounds - 1] += 1
                    accepted[:run] += 1
                    run = 0
            np.testing.assert_array_equal(found.drafted_nEJ[n, e], drafted)
            np.testing.assert_array_equal(found.accepted_nEJ[n, e], accepted)
