"""By how much a difference of two decodings was decided."""

import numpy as np
import pytest

from lsjax.evaluation import comparison
from lsjax.evaluation.comparison import first_difference


@pytest.mark.parametrize(
    "logits, found, margin",
    [
        ([5.0, 4.5, -3.0], 1, 0.5),
        ([5.0, 5.00001, -3.0], 1, 1e-5),
        ([5.0, 5.00001, -3.0], 2, 8.00001),  # a tie, but of other tokens
        ([4.0, 3.0, 6.0], 1, 3.0),  # the expected token was not the best either
        ([np.nan, 3.0, 6.0], 1, np.nan),
    ],
)
def test_margin(model, monkeypatch, logits, found, margin):
    seen = []
    monkeypatch.setattr(
        comparison, "last_logits", lambda _, tokens: seen.append(tokens) or np.array(logits)
    )
    difference = first_difference(model, [7, 8], [4, 0, 2], [4, found, 9])
    assert (difference.index, difference.expected, difference.found) == (1, 0, found)
    assert difference.margin == pytest.approx(margin, nan_ok=True)
    last_place = np.max(np.abs(logits)) * 2.0**-23
    assert difference.roundings == pytest.approx(margin / last_place, nan_ok=True)
    assert seen == [[7, 8, 4]]


def test_equal_and_shorter(model):
    assert first_difference(model, [7], [1, 2], [1, 2]) is None
    difference = first_difference(model, [7], [1, 2], [1])
    assert (difference.index, difference.expected, difference.found) == (1, 2, None)
    assert difference.margin == difference.roundings == np.inf
