"""Figures of a file of results, by hand."""

import pytest

from lsjax.config import LlamaConfig
from lsjax.evaluation.summary import ALL, UNSEEN, summarise

CONFIG = LlamaConfig.tiny(vocab_size=100)  # four layers
COUNTS = ["num_new_tokens", "rounds", "drafted", "accepted", "drafted_by_position", "seconds"]


def answer(strategy, example, counts, *, seen=False, confidence=None, score=1.0):
    own = {
        "strategy": strategy,
        "exit_layer": 2,
        "num_draft_tokens": 4,
        "draft_vocab": 25,
        "draft_confidence": confidence,
        "id": example,
        "group": "",
        "seen": seen,
        "scores": {"match": score},
        "prefill_seconds": 1.0,
    }
    return own | dict(zip(COUNTS, counts, strict=True))


@pytest.mark.parametrize("confidence, unsure", [(None, 0.0), (0.5, 0.75)])
def test_speed_by_hand(confidence, unsure):
    """Four rounds draft 4 + 1 + 2 + 1 tokens, of which 3 + 1 + 0 + 1 are accepted: one of the four
    drafts was as long as it may be. The last draft ends its text: nothing comes behind it."""
    plain = [answer("autoregressive", id_, (5, 4, 0, 0, [], 8.0)) for id_ in "ab"]
    drafting = [
        answer("drafting", "a", (7, 2, 5, 4, [2, 1, 1, 1], 4.0), confidence=confidence),
        answer("drafting", "b", (3, 2, 3, 1, [2, 1], 4.0), confidence=confidence, score=0.0),
    ]
    base, row = summarise([*plain, *drafting], CONFIG)
    assert (base["group"], base["speedup"], base["ideal"]) == (ALL, 1.0, None)
    assert base["ms_per_token"] == 2000 and base["share_of_ideal"] is None
    assert row["scores"]["match"] == {"mean": 0.5, "stderr": pytest.approx(0.5)}
    assert (row["ms_per_token"], row["speedup"], row["tokens_per_round"]) == (1000, 2.0, 2.0)
    head = CONFIG.head_params / CONFIG.layer_params
    # Two drafts a round, with a quarter of the head.
    read = 2 * (2 + head / 4) + unsure * head / 4 + 4 + head
    assert row["ideal"] == pytest.approx(2.0 * (4 + head) / read)
    assert row["share_of_ideal"] == pytest.approx(2.0 / row["ideal"])


def test_examples_that_training_has_seen():
    answers = [
        answer("autoregressive", "a", (5, 4, 0, 0, [], 8.0), seen=True),
        answer("autoregressive", "b", (5, 4, 0, 0, [], 4.0), score=0.0),
    ]
    rows = summarise(answers, CONFIG)
    assert [(row["group"], row["examples"]) for row in rows] == [(ALL, 2), (UNSEEN, 1)]
    assert [row["scores"]["match"]["mean"] for row in rows] == [0.5, 0.0]
    assert [row["ms_per_token"] for row in rows] == [1500, 1000]
