"""Intervals against closed forms, and how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import t

from lsjax.evaluation.intervals import Estimate, from_samples, from_seeds, ratio


def test_a_single_sample_has_no_interval():
    found = from_samples(np.mean, [3.0], of="prompts")
    assert found == Estimate(3.0, None, None, "prompts", 1) and found.text() == "3.00"


def test_a_mean_has_about_the_normal_interval():
    """For many samples the bootstrap's interval is mean +- 1.96 standard errors."""
    samples = np.random.default_rng(3).normal(5, 2, 400)
    found = from_samples(np.mean, samples, of="prompts")
    half = 1.96 * samples.std() / 20
    assert found.value == pytest.approx(samples.mean()) and found.count == 400
    np.testing.assert_allclose(
        (found.low, found.high), samples.mean() + half * np.array([-1, 1]), atol=0.03
    )
    assert found.text(".1f") == f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"
    assert from_samples(np.mean, samples, of="prompts") == found


def test_a_ratio_keeps_its_pairs():
    """Prompts with many drafts have many accepted ones. Resampled apart, they would not agree."""
    drafted = np.array([1.0, 10.0, 100.0] * 10)
    found = from_samples(ratio, 0.5 * drafted, drafted, of="prompts")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert np.isnan(ratio(np.zeros((2, 3)), np.zeros((2, 3)), 1)).all()


def test_intervals_hold_the_truth_in_95_of_100():
    """Two hundred samples of 40 numbers; the share has a standard error of 1.5%."""
    random = np.random.default_rng(0)
    samples = [from_samples(np.mean, random.normal(1, 1, 40), of="prompts") for _ in range(200)]
    assert 0.90 <= np.mean([one.low <= 1 <= one.high for one in samples]) <= 0.99


def test_seeds_by_hand():
    """Mean 2, standard deviation 1, three seeds. One seed keeps its own interval."""
    found = from_seeds([Estimate(value) for value in (1.0, 2.0, 3.0)])
    half = t.ppf(0.975, 2) / 3**0.5
    np.testing.assert_allclose((found.value, found.low, found.high), (2, 2 - half, 2 + half))
    assert (found.of, found.count) == ("seeds", 3)
    alone = Estimate(1.0, 0.5, 1.5, "prompts", 8)
    assert from_seeds([alone]) is alone
