"""Who answered, in words and in figures."""

import pytest

from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.answers import Answer, acceptance_rate

VOCABULARY = DraftVocabulary.most_frequent({1: 2, 7: 1}, 2, 258)


@pytest.mark.parametrize(
    "strategy, words, fields",
    [
        (Autoregressive(), "autoregressive", {}),
        (EarlyExit(2), "early exit, exit 2", {"exit_layer": 2}),
        (
            SelfSpeculative(2, 4),
            "self speculative, exit 2, 4 drafts",
            {"exit_layer": 2, "num_draft_tokens": 4},
        ),
        (
            SelfSpeculative(2, 4, VOCABULARY),
            "self speculative, exit 2, 4 drafts of 2 tokens",
            {"exit_layer": 2, "num_draft_tokens": 4, "draft_vocab": 2},
        ),
        (
            SelfSpeculative(2, 4, draft_confidence=0.5),
            "self speculative, exit 2, 4 drafts, at 0.5 or more",
            {"exit_layer": 2, "num_draft_tokens": 4, "draft_confidence": 0.5},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_strategy(strategy, words, fields):
    answer = Answer.by(strategy)
    assert str(answer) == words
    assert answer.to_json() == {"strategy": strategy.name, **fields}
    assert Answer(**answer.to_json()) == answer


def test_a_forward_pass():
    assert str(Answer.forward_pass(1)) == "one pass of 1 layer"
    assert str(Answer.forward_pass(30)) == "one pass of 30 layers"


def test_acceptance_is_that_of_all_drafts_together():
    def answer(drafted, accepted):
        return Answer(strategy="self_speculative", drafted=drafted, accepted=accepted)

    assert acceptance_rate([answer(10, 1), answer(30, 9), Answer.forward_pass(4)]) == 0.25
    assert acceptance_rate([answer(0, 0), Answer.forward_pass(4)]) is None
