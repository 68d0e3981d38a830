"""Requests: what is refused, whose settings hold, and the tokens that end a text."""

import copy

import pytest

from lsjax.config import ConfigError, Sampling
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative

PROMPT, NEW = [1, 2, 3], 24
STRATEGY = SelfSpeculative(1, 4)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, STRATEGY)


@pytest.fixture(scope="module")
def whole(engine):
    """The text where nothing ends it."""
    (completion,) = engine.generate([PROMPT], max_new_tokens=NEW)
    return completion.token_ids


@pytest.mark.parametrize(
    "options, words",
    [
        ({"stop": ("a", "")}, "a stop string is empty: give the text to stop at"),
        (
            {"stop_ids": (3, -1)},
            r"stop_ids \(3, -1\) must be a tuple, each item a whole number of at least 0",
        ),
        ({"stop_ids": (3, 258)}, r"stop ids \[3, 258\] .* vocabulary of 258: give ids in 0..257"),
        ({"stop_ids": (2**40,)}, r"stop ids \[1099511627776\] .* vocabulary of 258"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1"),
    ],
)
def test_refused(model, tokenizer, options, words):
    engine = Engine(model, tokenizer)
    for refuse in (
        lambda: engine.generate([[1], Request(prompt=PROMPT, **options)]),
        lambda: engine.generate([[1], PROMPT], **options),
        lambda: next(engine.stream(PROMPT, **options)),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse()
    assert len(engine.programs) == 0


def test_a_request_has_settings_of_its_own(engine, whole):
    """What `generate` is told is for the prompts that are no requests."""
    stop_ids = (whole[3],)
    own = Request(prompt=PROMPT, max_new_tokens=7)
    ended = Request(prompt=PROMPT, max_new_tokens=NEW, stop_ids=stop_ids)
    found = engine.generate([PROMPT, own, ended], max_new_tokens=5)
    assert [c.token_ids for c in found] == [
        whole[:5],
        whole[:7],
        whole[: 1 + whole.index(*stop_ids)],
    ]
    assert [c.finish_reason for c in found] == ["length", "length", "stop"]


@pytest.mark.parametrize(
    "places, more",
    [
        ((5,), ()),
        ((9, 5, 12), ()),  # several, in any order
        ((5, 5, 5, 9, 9), ()),  # some of them twice
        ((5,), (258, 2**40, -1)),  # ids that the model does not have
        ((), (258, 2**40, -1)),
        ((), ()),
    ],
)
def test_ends_of_the_tokenizer(engine, whole, monkeypatch, places, more):
    """The text ends with the first token that is one of them, whatever else the list holds."""
    ending = copy.copy(engine.tokenizer)
    ending.eos_ids = (*more, *(whole[place] for place in places))
    monkeypatch.setattr(engine, "tokenizer", ending)
    first = min((whole.index(token) for token in ending.eos_ids if token in whole), default=NEW)
    (completion,) = engine.generate([PROMPT], max_new_tokens=NEW)
    assert completion.token_ids == whole[: first + 1]
    assert completion.text == ending.decode([*PROMPT, *whole[:first]])[len(ending.decode(PROMPT)) :]
    assert completion.finish_reason == ("eos" if places else "length")


def test_lists_of_ends_share_a_program(engine, monkeypatch):
    """Few ends or many: a list is filled up; ids that are there already take no room."""
    for count in (1, 2, 4):
        ending = copy.copy(engine.tokenizer)
        ending.eos_ids = tuple(range(250, 250 + count)) * 3
        monkeypatch.setattr(engine, "tokenizer", ending)
        engine.generate([PROMPT], max_new_tokens=2, stop_ids=(250,))
        programs = len(engine.programs) if count == 1 else programs
        assert len(engine.programs) == programs


@pytest.mark.long
def test_equal_prompts_are_sampled_with_seeds_that_count_up(engine):
    """Prompt number i of all has the seed + i, as in decode.py; a request keeps its own seed."""
    drawn = Sampling(temperature=1, seed=5)
    own = Request(prompt=PROMPT, max_new_tokens=NEW, sampling=drawn)
    found = engine.generate([PROMPT, own, PROMPT], sampling=drawn, max_new_tokens=NEW)
    assert [c.seed for c in found] == [5, 5, 7]
    assert found[0].token_ids == found[1].token_ids != found[2].token_ids
