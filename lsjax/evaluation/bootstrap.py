"""How sure a difference between two systems is that were scored on the same examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsjax.config import check
from lsjax.evaluation.summary import scores_by_example

RESAMPLES = 10_000
AT_ONCE = 2**22  # numbers drawn together
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same examples.

    first, second: mean scores. low, high: of the interval in which second - first lies at LEVEL.
    """

    examples: int
    first: float
    second: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def compare(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    score: str,
    seed: int = 0,
) -> Comparison:
    """Compares the answers (lines of results) of two systems by one of their scores.

    Examples that only one of them has answered do not count. The interval is of the paired
    bootstrap (Efron and Tibshirani, 1993, section 13.3): percentiles of the mean difference over
    examples that are drawn again with replacement.

    Raises ConfigError where no example has the score in both, or where one id names two examples.
    """
    references = [
        {answer["id"]: answer["reference"] for answer in part} for part in (first, second)
    ]
    one, other = (scores_by_example(part).get(score, {}) for part in (first, second))
    common = [name for name in one if name in other]
    check(bool(common), f"no example has the score {score} in both: compare answers to one task")
    for name in common:
        check(
            references[0][name] == references[1][name],
            f"{name} has another reference in the one file than in the other: these are not "
            "answers to the same rows",
        )
    one_n, other_n = (np.array([part[name] for name in common]) for part in (one, other))
    low, high = paired_interval(other_n - one_n, seed)
    return Comparison(len(common), float(one_n.mean()), float(other_n.mean()), low, high)


def paired_interval(difference_n: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile interval, at LEVEL, of the mean of these differences."""
    count, draws = len(difference_n), np.random.default_rng(seed)
    block = max(1, AT_ONCE // count)
    means = [
        difference_n[draws.integers(count, size=(min(block, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, block)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
