"""Seconds of a round with each choice, measured once for each model, cache size and machine."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lsjax.decoding.auto.adaptive import Adaptive, AutoArguments
from lsjax.decoding.stopwatch import Stopwatch
from lsjax.io.files import local_cache, write_whole

MEASURING = 20.0  # seconds; compiling comes before
REPEATS, FEWEST = 15, 4  # of each choice
ENOUGH = 0.05  # error of the medians at which no further repeat is needed
CALL, MOST_ROUNDS = 0.05, 6  # seconds of a call with short rounds, and its most rounds
VERSION = 11  # of `measure` and of rounds: files of earlier ones are not read


def kept_seconds(
    start: Callable[[], Stopwatch],
    identity: Sequence[Any],
    arguments: AutoArguments,
    strategy: Adaptive,
    budget: float,
    track: Callable[[Sequence], Iterable] = iter,
) -> np.ndarray:
    """Seconds [Q, J] of a round with each source and length. A file keeps them with their budget.
    If some choices were not reached, a larger budget measures all of them again.

    start: makes the stopwatch, if one is needed. identity: all that the seconds depend on.
    arguments: of the strategy's program.
    """
    name = hashlib.sha256(repr([VERSION, *identity]).encode()).hexdigest()[:32]
    file = local_cache() / "round_seconds" / f"{name}.json"
    try:
        seconds_QJ, old_budget = map(np.array, json.loads(file.read_text()))
        good = seconds_QJ.shape == (len(strategy.sources), len(strategy.lengths))
        good &= (seconds_QJ > 0).all()
        good &= np.isfinite(seconds_QJ).all() or old_budget >= budget
    except Exception:  # no file, or it may hold anything
        good = False
    if not good:
        seconds_QJ = measure(start(), arguments, budget, track)
        with contextlib.suppress(OSError):  # a cache that can't be written
            write_whole(file, json.dumps([seconds_QJ.tolist(), budget]).encode())
    return seconds_QJ


def measure(
    stopwatch: Stopwatch,
    arguments: AutoArguments,
    budget: float,
    track: Callable[[Sequence], Iterable] = iter,
) -> np.ndarray:
    """Seconds [Q, J] of a round with each source and length. Rounds without drafts come first, then
    medium lengths. Ends after FEWEST repeats if these agree, as they do on a quiet machine. Choices
    that were not reached within `budget` seconds are infinite."""
    shape = sources, lengths = arguments.seconds_QJ.shape

    def only(choice: tuple[int, int]) -> AutoArguments:
        seconds_QJ = jnp.full(shape, jnp.inf, jnp.float32).at[choice].set(1.0)
        return arguments.with_seconds(seconds_QJ)

    choices = sorted(np.ndindex(shape), key=lambda at: (at[1] > 0, abs(2 * at[1] - lengths)))
    stopwatch.run(1, only((0, 0)))  # the first call is slower
    begin = time.perf_counter()
    call = stopwatch.empty_call(only((0, 0)))
    # A small model's first round is slower: its weights are not in the processor's cache yet.
    most = max(1, min(MOST_ROUNDS, round(CALL / stopwatch.run(1, only((0, 0)))[0])))
    found_nQJ = np.full((REPEATS, sources, lengths), math.inf)
    agreed = False
    for repeat in track(range(REPEATS)):
        for choice in choices:
            late = time.perf_counter() - begin >= budget
            if agreed or (late and not np.isinf(found_nQJ).all()):
                break
            whole, done = stopwatch.run(most, only(choice))
            found_nQJ[repeat, *choice] = max(whole - call, 1e-9) / done
        agreed = agreed or (repeat + 1 >= FEWEST and typical(found_nQJ)[1] < ENOUGH)
    return ordered(typical(found_nQJ)[0])


def ordered(seconds_QJ: np.ndarray) -> np.ndarray:
    """The seconds, none below that of less work: shorter drafts, or a lookup of the same length.
    Where a busy machine found the contrary, `auto` would draft too much. Infinite ones stay."""
    known_QJ = np.isfinite(seconds_QJ)
    least_QJ = np.maximum.accumulate(np.where(known_QJ, seconds_QJ, 0), axis=1)
    return np.where(known_QJ, np.maximum(least_QJ, least_QJ[:1]), math.inf)


def typical(found_nQJ: np.ndarray) -> tuple[np.ndarray, float]:
    """Medians of the repeats, and their relative error: the root mean square of standard errors, by
    median deviations. A machine has slow phases, which affect all choices of a repeat. So repeats
    are compared by the ratios of their seconds."""
    known_QJ = np.isfinite(found_nQJ[0])
    whole_n = np.isfinite(found_nQJ[:, known_QJ]).all(1)
    log_nQJ = np.log(found_nQJ[whole_n])
    level_n = log_nQJ[:, known_QJ].mean(1)
    ratio_nQJ = log_nQJ - level_n[:, None, None]
    typical_QJ = np.median(ratio_nQJ, axis=0)
    # Of a normal distribution: 1.48 median deviations are a standard deviation, and a median's
    # error is 1.25 times that of a mean.
    deviations = np.median(np.abs(ratio_nQJ[:, known_QJ] - typical_QJ[known_QJ]), axis=0)
    error = 1.25 * 1.48 * math.sqrt(np.mean(deviations**2) / whole_n.sum())
    return np.exp(typical_QJ + np.median(level_n)), error
