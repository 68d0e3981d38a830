"""Requests in the rows of a batch: who enters when, what is read and compiled, what comes out."""

import heapq
import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import GREEDY, Sampling
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from tests.marks import long

STRATEGIES = [
    Autoregressive(),
    EarlyExit(1),
    SelfSpeculative(1, 3, DraftVocabulary(np.arange(0, 258, 2))),
]
NAMES = ["autoregressive", "early_exit", "draft_vocabulary"]
# Ragged, of different lengths, greedy beside sampled; neighbours share a prompt or a seed.
REQUESTS = [
    Request(prompt=prompt, max_new_tokens=new, sampling=sampling, log_probs=asks)
    for prompt, new, sampling, asks in [
        ([7], 9, GREEDY, True),
        ([1, 2, 3], 24, Sampling(temperature=1.0, seed=3), True),
        (list(range(40, 60)), 1, Sampling(temperature=1.0, seed=3), True),
        ([1, 2, 3], 24, Sampling(temperature=1.0, seed=4), False),
        ([104, 105] * 20, 5, Sampling(temperature=0.7, top_p=0.6, seed=5), True),
        ([1, 2, 3, 4], 17, Sampling(temperature=1.3, top_p=0.9, seed=5), False),
        ([200], 24, GREEDY, False),
        (
            list(range(40, 60)),
            12,
            Sampling(temperature=0.9, top_p=0.8, seed=2**32 - 1),
            True,
        ),
        (list(range(40, 58)), 3, GREEDY, True),
    ]
]


@pytest.fixture(scope="module")
def together(shallow, tokenizer):
    """Completions of all requests in batches of four, by the name of the strategy."""

    def complete(name: str):
        strategy = STRATEGIES[NAMES.index(name)]
        return Engine(shallow, tokenizer, strategy, batch_size=4).generate(REQUESTS)

    return cache(complete)


@pytest.mark.parametrize("name", ["autoregressive", *long("draft_vocabulary")])
def test_more_requests_than_rows(shallow, tokenizer, together, name):
    """A request gives what it gives with nobody beside it, greedy or sampled."""
    engine = Engine(shallow, tokenizer, STRATEGIES[NAMES.index(name)])
    found = engine.generate(REQUESTS)
    for alone, beside in zip(found, together(name), strict=True):
        same = ("token_ids", "text", "finish_reason", "seed", "rounds", "drafted", "accepted")
        assert [getattr(alone, key) for key in same] == [getattr(beside, key) for key in same]
    assert found[1].token_ids != found[3].token_ids, "two seeds, one text"


@pytest.mark.long
def test_programs_without_the_settings_of_others(shallow, tokenizer, together):
    (own,) = Engine(shallow, tokenizer, Autoregressive()).generate(REQUESTS[1:2])
    assert own.token_ids == together("autoregressive")[1].token_ids


@pytest.mark.long
def test_strategies_agree_where_nothing_is_drawn(together):
    for index, request in enumerate(REQUESTS):
        if request.sampling == GREEDY:
            ids = [together(name)[index].token_ids for name in NAMES if name != "early_exit"]
            assert ids == ids[:1] * 2


@pytest.mark.parametrize("name", ["autoregressive", *long("early_exit", "draft_vocabulary")])
def test_log_probs_are_those_of_the_plain_forward(shallow, together, name):
    """The exit gives them for early exit. They ignore temperature, filters and who proposed the
    token."""
    index = 0 if name == "early_exit" else 1
    forward = jax.jit(lambda model, ids: model.unembed(model.exits(ids)[index]))
    accepted = 0
    for request, completion in zip(REQUESTS, together(name), strict=True):
        if not request.log_probs:
            assert completion.log_probs is None
            continue
        ids = request.prompt + completion.token_ids
        padded = jnp.array([ids + [0] * (64 - len(ids))])
        log_TV = np.asarray(jax.nn.log_softmax(forward(shallow, padded)))[0]
        places = np.arange(len(request.prompt), len(ids))
        expected = log_TV[places - 1, completion.token_ids]
        np.testing.assert_allclose(completion.log_probs, expected, atol=2e-4)
        accepted += completion.accepted
    assert (accepted > 0) == (name == NAMES[2])


def ends_of(new_tokens: list[int], rows: int) -> list[int]:
    """When each request ends if a row that ends takes the next one at once; in rounds."""
    free, ends = [0] * rows, []
    for new in new_tokens:
        ends.append(heapq.heappop(free) + new - 1)
        heapq.heappush(free, ends[-1])
    return ends


def test_200_requests(shallow, tokenizer, caplog):
    """Nothing is compiled after the first round, nobody waits for a longer text than theirs."""
    random = np.random.default_rng(0)
    engine = Engine(shallow, tokenizer, batch_size=4, ignore_end=True)

    def requests(count):
        return [
            Request(
                prompt=random.integers(0, 256, random.integers(1, 33)).tolist(),
                max_new_tokens=int(random.integers(1, 7)),
            )
            for _ in range(count)
        ]

    engine.generate(requests(5))  # all rows, and one that enters later
    many = requests(200)
    many[0] = Request(prompt=[1], max_new_tokens=200)
    many[60] = Request(prompt=[1], max_new_tokens=40)
    programs, order = len(engine.programs), []
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = engine.generate(many, on_completion=lambda index, _: order.append(index))
    compiled = [record.getMessage() for record in caplog.records]
    assert not [message for message in compiled if "ompil" in message]
    assert len(engine.programs) == programs
    assert sorted(order) == list(range(200)) and order[-1] == 0
    assert [c.num_new_tokens for c in found] == [request.max_new_tokens for request in many]
    ends = ends_of([request.max_new_tokens for request in many], 4)
    assert [ends[index] for index in order] == sorted(ends)


def test_compiling_is_noticed(caplog):
    """Else the test above would say nothing."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))
    assert [record for record in caplog.records if "ompil" in record.getMessage()]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_prompts_share_is_read_once(shallow, tokenizer, count_prefilled, batch_size):
    """Each prompt is read from where it parts from the one before, the last token always."""
    examples = list(range(100, 130))
    prompts = [
        *([*examples, 1], [*examples, 2, 3], [*examples, 2, 3]),
        *([*examples[:10], 4, 5], [6], [*examples, 1], [*examples, 1, 7, 8, 9]),
    ]
    engine = Engine(shallow, tokenizer, batch_size=batch_size)
    counts = count_prefilled(engine)
    found = engine.generate(prompts, max_new_tokens=6)
    assert counts == [31, 2, 1, 2, 1, 31, 3]
    fresh = Engine(shallow, tokenizer)
    for prompt, completion in zip(prompts, found, strict=True):
        (alone,) = fresh.generate([prompt], max_new_tokens=6)
        assert alone.token_ids == completion.token_ids
