"""Figures of reports that were made by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lsjax.decoding.cost import ideal_speedup
from lsjax.evaluation.scores import Cell
from lsjax.reporting.figures import (
    accepted,
    agreements,
    choices,
    equal_texts,
    in_words,
    loss_difference,
    losses,
    score,
    speeds,
    summarised,
)
from lsjax.reporting.page import facts
from tests.reporting.reports import SHAPE, answer, answers, measured, report


def test_exits():
    found = losses(report(), "layerskip")
    assert [one.value for one in found] == [2.5 + 16 - e for e in range(1, 17)]
    assert (found[0].low, found[0].high, found[0].of) == (17.5, 17.5, "batches")
    assert [one.value for one in agreements(report(), "plain")][3::4] == [0.25, 0.5, 0.75, 1.0]


def test_differences_are_of_the_same_batches():
    """Both batches are hard for both models in the same way, so the difference is certain."""
    one, other = measured("layerskip", 2.5), measured("plain", 2.0)
    shift = ([0] * 15 + [50.0], [0] * 16)
    one, other = (
        replace(m, loss_nE=tuple(map(tuple, (np.array(m.loss_nE) + shift).tolist())))
        for m in (one, other)
    )
    found = loss_difference(one, other)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert losses(report(one), "layerskip")[-1].high > losses(report(one), "layerskip")[-1].low + 1


def test_speeds():
    """Medians over the two prompts, and the ideal one of exit 1 with 3 drafts a round."""
    plain, auto, short, long = speeds(report())
    assert (plain.speedup.value, auto.speedup.value, short.speedup.value) == (1.0, 2.0, 1.25)
    assert (long.speedup.value, long.speedup.low, long.speedup.high) == (2.25, 2.0, 2.5)
    assert long.figures["tokens_per_second"] == (10 / 5 + 10 / 4) / 2
    drafts, rate = 24 / 8, 15 / 24
    assert long.figures["ideal"] == pytest.approx(ideal_speedup(SHAPE, 1, drafts, rate))


def test_acceptance_is_that_of_the_longest_drafts():
    found = accepted(report())
    np.testing.assert_array_equal(found.drafted_EJ, [[8, 8, 8]])
    np.testing.assert_array_equal(found.accepted_EJ, [[8, 6, 1]])
    assert accepted(report(measured("given", 2.0))) is None


def test_what_auto_drafted_with():
    """Rounds and tokens of all prompts. Other strategies have one source."""
    found = answers()
    for one, sources in zip(
        [one for one in found if one["strategy"] == "auto"],
        (
            {"exit 1": {"rounds": 3, "tokens": 9}, "none": {"rounds": 2, "tokens": 2}},
            {"exit 1": {"rounds": 1, "tokens": 1}, "lookup": {"rounds": 2, "tokens": 7}},
        ),
        strict=True,
    ):
        one["sources"] = sources
    given = report(measured("layerskip", 2.5, answers=found))
    assert choices(given) == [("exit 1", 0.5, 2.5), ("none", 0.25, 1.0), ("lookup", 0.25, 3.5)]
    assert choices(report()) == []
    words = dict(facts(given))["auto drafted with"]
    assert words.startswith("exit 1 in 50% of its rounds, 2.5 new tokens a round; none in 25%")


def test_the_answer():
    words = in_words(report())
    assert words.startswith("Yes: auto writes 2.00 (2.00 to 2.00) times as many tokens a second")
    assert "self speculative, exit 1, 3 drafts, writes 2.25 (2.00 to 2.50). Held-out" in words
    assert "loss 2.500, without LayerSkip 2.000; difference +0.500 (+0.500 to +0.500)." in words


@pytest.mark.parametrize(
    "auto_seconds, verdict", [((12.5, 14.0), "No: "), ((12.5, 9.0), "Not clear: ")]
)
def test_answers_that_are_not_yes(auto_seconds, verdict):
    """The fixed settings were chosen on the same prompts, so that they do not decide."""
    found = report(measured("given", 2.0, answers=answers(auto_seconds=auto_seconds)))
    assert in_words(found).startswith(verdict) and "without LayerSkip" not in in_words(found)


def test_nothing_is_decoded():
    assert in_words(report(measured("given", 2.0))) == "Nothing was decoded. Held-out loss 2.000."
    assert not summarised(report(measured("given", 2.0))).pays


def test_figures_of_a_busy_machine_decide_nothing():
    """Two repeats of auto's greedy text took 6 and 1 seconds."""
    rows = [*answers(), answer(Cell("auto"), 0, 1.0, [4], [4])]
    found = report(measured("given", 2.0, answers=tuple(rows)))
    assert summarised(found).pays is None and summarised(found).auto.speedup.low > 1
    assert re.match(r"Not clear: auto writes [\d.]+ \([\d.]+ to [\d.]+\)\? times", in_words(found))


def test_seeds():
    """Figures of two trainings are means; their intervals come from the seeds."""
    models = [measured("layerskip", 2.5, seed=0, exits=(1,), answers=answers())]
    models += [measured("layerskip", 3.0, seed=1, exits=(1,), answers=answers((4.0, 4.0)))]
    models += [measured("plain", 2.0, seed=seed) for seed in (0, 1)]
    found = summarised(report(*models))
    assert (found.loss.value, found.loss.of, found.loss.count) == (2.75, "seeds", 2)
    assert found.loss_difference.value == 0.75 and found.loss_difference.low < 0.5
    assert found.fixed.speedup.value == pytest.approx((2.25 + 2.5) / 2)
    assert found.fixed.figures["interval_of"] == "seeds"
    # The same prompts: their drafts are added up.
    np.testing.assert_array_equal(accepted(report(*models)).drafted_nEJ[:, 0], [[8] * 3] * 2)


def test_scores_of_a_task():
    """Those of autoregressive decoding, which all strategies share."""
    rows = [one | {"scores": {"accuracy": float(one["id"] == "1")}} for one in answers()]
    own = measured("layerskip", 2.5, exits=(1,), answers=tuple(rows))
    plain = measured("plain", 2.0, answers=(rows[0],))
    found = report(own, plain, score="accuracy")
    assert score(found, "layerskip").value == 0.5 and score(found, "plain").value == 0
    assert "Score (accuracy): 0.500 (0.000 to 1.000) with LayerSkip, 0.000 without" in in_words(
        found
    )


def test_differences_of_scores_are_of_the_same_prompts():
    """The gaps are -0.25 and 0.25, so their interval is half as wide as that of the scores."""
    both = [one | {"scores": {"accuracy": float(one["id"] == "1")}} for one in answers()]
    own = measured("layerskip", 2.5, exits=(1,), answers=tuple(both))
    rows = [one | {"scores": {"accuracy": 0.25 + one["scores"]["accuracy"] / 2}} for one in both]
    plain = measured("plain", 2.0, answers=tuple(rows))
    found = summarised(report(own, plain, score="accuracy")).score_difference
    assert (found.value, found.low, found.high, found.count) == (0.0, -0.25, 0.25, 2)
    assert summarised(report(own, score="accuracy")).score_difference is None


def test_greedy_texts_that_differ_are_counted():
    """Six texts of auto and of exit 1: one differs, one is sampled and does not count."""
    rows = [*answers()]
    rows[1] |= {"difference": {"position": 3}}
    rows[2] |= {"seed": 0}
    found = report(measured("given", 2.0, answers=tuple(rows)))
    assert equal_texts(found) == (4, 5)


def test_texts_of_one_token_have_no_speed():
    rows = [*answers(), answer(Cell("auto"), 2, 0.0, num_new_tokens=1)]
    assert len(speeds(report(measured("given", 2.0, answers=tuple(rows))))) == 4
