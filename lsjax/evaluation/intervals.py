"""Figures with confidence intervals: from the texts or batches that were measured, by bootstrap
(Efron, 1979), or from repeats of a training with several seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95% interval, which are None where one value is all there is.

    of: what was resampled or repeated, such as "prompts"; count: how many there are.
    """

    value: float
    low: float | None = None
    high: float | None = None
    of: str = ""
    count: int = 1

    def text(self, form: str = ".2f") -> str:
        """The figure with its interval: 1.93 (1.88 to 1.98)."""
        shown = format(self.value, form)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} ({self.low:{form}} to {self.high:{form}})"


def from_samples(
    statistic: Callable[..., np.ndarray], *columns: Sequence[float], of: str
) -> Estimate:
    """The statistic of paired columns, with an interval by the percentile bootstrap.

    statistic: of the columns and `axis`, as scipy.stats.bootstrap calls it. Its resamples are drawn
    from seed 0, so equal measurements have equal intervals.
    """
    from scipy.stats import bootstrap  # slow to import

    data = [np.asarray(column, float) for column in columns]
    value, count = float(statistic(*data, axis=-1)), len(data[0])
    if count < 2:
        return Estimate(value, of=of, count=count)
    found = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), of, count)


def ratio(above: np.ndarray, below: np.ndarray, axis: int) -> np.ndarray:
    """Sum of the first column over that of the second; NaN where nothing was counted."""
    total = below.sum(axis)
    return np.divide(above.sum(axis), total, where=total > 0, out=np.full_like(total, np.nan))


def from_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over trainings that differ in their seed, with Student's interval. A single training
    keeps its own interval."""
    if len(estimates) == 1:
        return estimates[0]
    from scipy.stats import t

    values = [one.value for one in estimates]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, "seeds", len(values))
