"""Answers: who decoded them, a file that resumes and never mixes things, and their figures."""

import json

import pytest

from lsjax.config import ConfigError, Sampling
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.answers import Question, as_line, read, resume
from lsjax.evaluation.scores import ALL, UNSEEN, Cell, summarise


def append(file, answer):
    with file.open("a", encoding="utf-8") as stream:
        stream.write(as_line(answer))


VOCABULARY = DraftVocabulary.most_frequent({1: 2, 7: 1}, 2, 258)


@pytest.mark.parametrize(
    "strategy, words, cell",
    [
        (Autoregressive(), "autoregressive", Cell("autoregressive")),
        (EarlyExit(2), "early exit, exit 2", Cell("early_exit", 2)),
        (
            SelfSpeculative(2, 4),
            "self speculative, exit 2, 4 drafts",
            Cell("self_speculative", 2, 4),
        ),
        (
            SelfSpeculative(2, 4, VOCABULARY),
            "self speculative, exit 2, 4 drafts, vocabulary 2",
            Cell("self_speculative", 2, 4, 2),
        ),
        (
            SelfSpeculative(2, 4, draft_confidence=0.5),
            "self speculative, exit 2, 4 drafts, confidence 0.5",
            Cell("self_speculative", 2, 4, None, 0.5),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cell(strategy, words, cell):
    assert Cell.of(strategy) == cell and str(cell) == words
    assert Cell.of(cell._asdict()) == cell


def test_a_key_is_all_that_an_answer_depends_on():
    """Strategy, id and sample, prompt, reference and row, and the seed where tokens are drawn."""

    def key(prompt=(1, 2), strategy=None, sample=0, temperature=0.0, seed=0, **example) -> str:
        sampling = Sampling(temperature=temperature, seed=seed)
        request = Request(prompt=prompt, sampling=sampling)
        question = Question(**{"id": "a", "request": request, "sample": sample, **example})
        return question.key(strategy or Autoregressive())

    assert key() == key(seed=1)
    others = [key(), key([1, 3]), key(reference="r"), key(fields={"a": 1}), key(id="b")]
    others += [key(temperature=1.0), key(temperature=1.0, seed=1), key(seen=True), key(sample=1)]
    other_vocabulary = DraftVocabulary.most_frequent({1: 2, 8: 1}, 2, 258)
    strategies = [SelfSpeculative(2, 4, one) for one in (None, VOCABULARY, other_vocabulary)]
    strategies += [SelfSpeculative(2, 8, draft_confidence=0.5)]
    strategies += [Adaptive(), Adaptive((1,)), Adaptive((1, 2)), Adaptive(lengths=(0, 4))]
    others += [key(strategy=strategy) for strategy in strategies]
    assert len(set(others)) == len(others)


ASKED = {"task": "topv2", "max_new_tokens": 2, "sampling": {"temperature": 0.5}}


def line(name: str, **more) -> dict:
    return {"key": f"key of {name}", "text": "\u00fc"} | more


def resumed(file, asked=ASKED) -> list[dict]:
    return list(resume(file, asked).values())


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.jsonl"


def test_begin_append_and_resume(file):
    assert resume(file, ASKED) == {}
    append(file, line("a\n"))
    assert resumed(file) == [line("a\n")]
    append(file, line("b"))
    assert read(file) == (ASKED, [line("a\n"), line("b")])
    append(file, line("b", text="again"))
    assert resumed(file) == [line("a\n"), line("b", text="again")]


def test_every_torn_end_is_dropped(file):
    resume(file, ASKED)
    append(file, line("a"))
    whole = file.read_bytes()
    append(file, line("b"))
    longer = file.read_bytes()
    for length in range(len(longer) + 1):
        file.write_bytes(longer[:length])
        kept = [line(name) for name in "ab"]
        kept = kept[: (length >= len(whole)) + (length == len(longer))]
        assert resumed(file) == kept
        append(file, line("c"))
        assert read(file) == (ASKED, [*kept, line("c")])


def test_answers_under_other_conditions_are_kept(file):
    resume(file, ASKED)
    append(file, line("a"))
    before = file.read_bytes()
    other = {**ASKED, "max_new_tokens": 3, "sampling": {"temperature": 0.7}}
    with pytest.raises(ConfigError) as error:
        resume(file, other)
    assert "max_new_tokens was 2 and is now 3, sampling.temperature was 0.5 and is now 0.7" in str(
        error.value
    )
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", '{"asked": 1, "x": 2', '{"id": 3}\n', "[]\n", "\n"]
)
def test_another_file_is_left_alone(file, content):
    file.write_text(content)
    with pytest.raises(ConfigError, match="is not a file of answers"):
        resume(file, ASKED)
    assert file.read_text() == content


@pytest.mark.parametrize("bad", ['{"id": ', '{"prompt": 0, "text": "of something else"}'])
def test_a_bad_line_in_the_middle_is_named(file, bad):
    resume(file, ASKED)
    with file.open("a") as stream:
        stream.write(bad + "\n" + json.dumps(line("b")) + "\n")
    with pytest.raises(ConfigError, match="is not a file of answers"):
        resume(file, ASKED)


COUNTS = ["num_new_tokens", "rounds", "drafted", "accepted"]


def answer(cell, example, counts, *, seen=False, score=1.0, text="x", seed=None) -> dict:
    own = cell._asdict() | {"id": example, "group": "", "seen": seen, "scores": {"match": score}}
    return own | {"text": text, "seed": seed} | dict(zip(COUNTS, counts, strict=True))


def test_figures_by_hand():
    """Four rounds draft eight tokens, of which five are accepted; one of two texts is equal."""
    cell = Cell("self_speculative", 2, 4)
    plain = [answer(Cell("autoregressive"), id_, (5, 4, 0, 0)) for id_ in "ab"]
    drafting = [
        answer(cell, "a", (7, 2, 5, 4)),
        answer(cell, "b", (3, 2, 3, 1), score=0.0, text="y"),
    ]
    base, row = summarise([*plain, *drafting])
    assert (base["group"], base["equal"], base["acceptance_rate"]) == (ALL, 1.0, None)
    assert row["strategy"] == "self speculative, exit 2, 4 drafts"
    assert row["scores"]["match"] == {"mean": 0.5, "stderr": pytest.approx(0.5)}
    assert (row["tokens_per_round"], row["acceptance_rate"], row["equal"]) == (2.0, 5 / 8, 0.5)


def test_sampled_texts_are_not_compared():
    cells = Cell("autoregressive"), Cell("early_exit", 2)
    rows = summarise([answer(cell, "a", (5, 4, 0, 0), seed=7) for cell in cells])
    assert [row["equal"] for row in rows] == [None, None]


def test_nothing_accepted_is_a_rate_of_zero():
    (row,) = summarise([answer(Cell("self_speculative", 2, 4), "a", (5, 4, 9, 0))])
    assert row["acceptance_rate"] == 0.0 and row["equal"] is None


def test_examples_that_training_has_seen():
    answers = [
        answer(Cell("autoregressive"), "a", (5, 4, 0, 0), seen=True),
        answer(Cell("autoregressive"), "b", (5, 2, 0, 0), score=0.0),
    ]
    rows = summarise(answers)
    assert [(row["group"], row["examples"]) for row in rows] == [(ALL, 2), (UNSEEN, 1)]
    assert [row["scores"]["match"]["mean"] for row in rows] == [0.5, 0.0]
    assert [row["tokens_per_round"] for row in rows] == [8 / 6, 2.0]
