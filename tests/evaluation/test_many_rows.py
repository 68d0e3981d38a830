"""Costs of rounds with many rows, by hand, and what the figures of a measurement must obey."""

import pytest

from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation import many_rows
from lsjax.evaluation.many_rows import RoundCost, fastest, time_rounds, tokens_per_round


def cost(drafts, token_seconds=1.0, round_seconds=2.0, rows=1):
    return RoundCost(rows, 2, drafts, token_seconds, round_seconds)


def test_tokens_of_a_round():
    assert tokens_per_round(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert tokens_per_round(1, 4) == 5 and tokens_per_round(0, 4) == 1
    assert tokens_per_round(0.9, 0) == 1


@pytest.mark.parametrize(
    "drafts, seconds, expected",
    [
        (1, 1.5, 0.5),  # 1 + a = 1.5
        (2, 1.75, 0.5),  # 1 + a + a^2 = 1.75
        (4, 5.0, 1.0),
        (4, 5.1, None),
        (2, 1.0, 0.0),
    ],
)
def test_a_round_pays_where_it_makes_the_tokens_that_it_costs(drafts, seconds, expected):
    found = cost(drafts, 2.0, 2 * seconds)
    assert found.tokens == seconds
    assert found.pays_from == (None if expected is None else pytest.approx(expected, abs=1e-5))
    if expected:
        assert found.speedup(expected) == pytest.approx(1)


def test_the_best_length_depends_on_the_acceptance():
    short, long = cost(1, round_seconds=1.2), cost(8, round_seconds=2.5)
    assert fastest([short, long], 0.5) == short  # 1.25 against 0.80
    assert fastest([short, long], 0.9) == long  # 1.58 against 2.45


def test_seconds_are_those_of_the_rounds_alone(shallow, tokenizer, monkeypatch):
    """A clock that counts the rounds of a call, with 100 s for the call itself. The n-th strategy
    takes n seconds a round."""
    engine = Engine(shallow, tokenizer)

    class Clocked:
        made = 0

        def __init__(self, strategy, rows, capacity):
            Clocked.made += 1
            assert (rows, capacity) == (3, 320)
            self.seconds = Clocked.made

        def run(self, rounds):
            done = min(rounds, 7)  # the cache is full
            return 100.0 + self.seconds * done, done

        def empty_call(self):
            return self.run(0)[0]

    monkeypatch.setattr(engine.runtime, "stopwatch", Clocked)
    monkeypatch.setattr(many_rows, "CALL", 10_000)
    strategies = [SelfSpeculative(1, 2), SelfSpeculative(1, 4)]
    found = time_rounds(engine.runtime, strategies, 3, 320, repeats=2)
    assert found == [RoundCost(3, 1, 2, 1.0, 2.0), RoundCost(3, 1, 4, 1.0, 3.0)]


def test_every_round_is_counted(shallow, tokenizer):
    """A second call starts from the same state. Rows have room for 160 more tokens."""
    engine = Engine(shallow, tokenizer)
    rounds = engine.runtime.stopwatch(SelfSpeculative(1, 2), 3, 320)
    for asked in (0, 4, 1, 4):
        seconds, done = rounds.run(asked)
        assert done == asked and seconds > 0
    _, most = rounds.run(1_000)
    assert 160 / 3 - 1 <= most <= 160
