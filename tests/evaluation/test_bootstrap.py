"""Paired differences and their interval."""

import math

import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.evaluation.bootstrap import compare, paired_interval


def answers(values, reference="r"):
    return [
        {"id": name, "sample": number, "reference": reference, "scores": {"exact_match": value}}
        for name, own in values.items()
        for number, value in enumerate(own)
    ]


def test_interval_of_many_is_that_of_the_normal_distribution():
    """The mean of n independent differences has a standard error of s / sqrt(n)."""
    difference_n = np.random.default_rng(1).normal(0.3, 2.0, size=4000)
    low, high = paired_interval(difference_n)
    half = 1.96 * difference_n.std() / math.sqrt(len(difference_n))
    assert low == pytest.approx(difference_n.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(difference_n.mean() + half, abs=0.05 * half)


def test_interval_of_two_examples():
    """Drawn again, -1 and 1 are (-1, -1), (-1, 1) twice, or (1, 1): the quarters outside."""
    assert paired_interval(np.array([-1.0, 1.0])) == (-1, 1)
    assert paired_interval(np.array([0.5, 0.5])) == (0.5, 0.5)


def test_the_same_examples_are_paired():
    first = answers({"a": [0], "b": [1], "only here": [1]})
    second = answers({"b": [1], "a": [1, 0], "only there": [0]})  # two samples of a
    found = compare(first, second, "exact_match")
    assert (found.examples, found.first, found.second, found.difference) == (2, 0.5, 0.75, 0.25)
    assert found.low <= 0.25 <= found.high
    assert found == compare(first, second, "exact_match")


def test_what_can_not_be_compared():
    first = answers({"a": [0]})
    with pytest.raises(ConfigError, match="a has another reference"):
        compare(first, answers({"a": [0]}, "other"), "exact_match")
    with pytest.raises(ConfigError, match="no example has the score rouge2 in both"):
        compare(first, first, "rouge2")
    with pytest.raises(ConfigError, match="no example has the score exact_match in both"):
        compare(first, answers({"b": [0]}), "exact_match")
