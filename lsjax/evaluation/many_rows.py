"""What rounds cost with many rows, and what they gain at an assumed acceptance.

A round verifies d + 1 positions of each row. With few rows that takes about as long as a token, as
both read all weights. With many rows the positions themselves take time, and a round pays only if
more of its drafts pass.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lsjax.decoding.runtime import Runtime
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, Strategy

ACCEPTANCES = (0.5, 0.7, 0.9)
CALL, MOST_ROUNDS = 0.3, 16  # seconds of a timed call, and its most rounds


@dataclass(frozen=True)
class RoundCost:
    """Seconds of a round, and of the autoregressive round that makes one token of each row."""

    rows: int
    exit_layer: int
    num_draft_tokens: int
    token_seconds: float
    round_seconds: float

    @property
    def tokens(self) -> float:
        """The tokens of a row that autoregressive decoding makes in the same time."""
        return self.round_seconds / self.token_seconds

    def speedup(self, acceptance: float) -> float:
        """Speedup over autoregressive decoding. acceptance: see `tokens_per_round`."""
        return tokens_per_round(acceptance, self.num_draft_tokens) / self.tokens

    @property
    def pays_from(self) -> float | None:
        """The acceptance at which both are equally fast; None if no acceptance suffices."""
        if self.speedup(1) < 1:
            return None
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if self.speedup(middle) >= 1 else (middle, high)
        return high


def tokens_per_round(acceptance: float, num_draft_tokens: int) -> float:
    """1 + a + ... + a^d: a draft passes with probability a if those before it did (Leviathan et
    al., 2023, equation 1)."""
    return sum(acceptance**passed for passed in range(num_draft_tokens + 1))


def fastest(costs: Iterable[RoundCost], acceptance: float) -> RoundCost:
    """The exit and length with the best speedup."""
    return max(costs, key=lambda cost: cost.speedup(acceptance))


def time_rounds(
    runtime: Runtime,
    strategies: Sequence[SelfSpeculative],
    rows: int,
    capacity: int,
    repeats: int,
) -> list[RoundCost]:
    """Costs of the strategies' rounds, timed in turns with autoregressive decoding. Half of the
    `capacity` slots of each row are in use."""
    plain = Autoregressive()
    rounds = {one: runtime.stopwatch(one, rows, capacity) for one in (plain, *strategies)}
    found: dict[Strategy, list[float]] = {one: [] for one in rounds}
    most: dict[Strategy, int] = {}
    empty: dict[Strategy, float] = {}
    for one, timed in rounds.items():
        timed.run(1)  # the first call is slower
        empty[one] = timed.empty_call()
        seconds, _ = timed.run(1)
        most[one] = max(1, min(MOST_ROUNDS, round(CALL / seconds)))
    for _ in range(repeats):
        for one, timed in rounds.items():
            seconds, done = timed.run(most[one])
            found[one].append(max(seconds - empty[one], 1e-9) / done)
    typical = {one: statistics.median(seconds) for one, seconds in found.items()}
    return [
        RoundCost(rows, one.exit_layer, one.num_draft_tokens, typical[plain], typical[one])
        for one in strategies
    ]
