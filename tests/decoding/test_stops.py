"""Stops of each request's own: where its text is cut, in every strategy."""

import codecs

import numpy as np
import pytest

from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from tests.marks import long

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [104, 105] * 8]
NEW = 24


def cut(request: Request, whole: list[int]) -> tuple[str, list[int], str]:
    """Text, tokens and reason by the definition: what is said of whole characters is searched after
    each token, and at the end all of it. Tokens are bytes here."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    decoder.decode(bytes(request.prompt))
    for count, token in enumerate(whole, start=1):
        if token in request.stop_ids:
            return text + decoder.decode(b"", final=True), whole[:count], "stop"
        text += decoder.decode(bytes([token]), final=count == NEW)
        found = [text.index(stop) for stop in request.stop if stop in text]
        if found:
            return text[: min(found)], whole[:count], "stop"
    return text, whole, "length"


@pytest.fixture(scope="module")
def single(model, tokenizer):
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def cases(single):
    """Requests with no stop, one, several, of one kind or both, which the texts hold or do not; and
    where each is to be cut."""
    wholes = single.generate(PROMPTS, max_new_tokens=NEW)
    found = []
    for seed in range(48):
        random = np.random.default_rng(seed)
        prompt, whole = PROMPTS[seed % len(PROMPTS)], wholes[seed % len(PROMPTS)]
        begins = random.integers(0, len(whole.text) - 4, random.integers(0, 3))
        stop = [whole.text[at : at + random.integers(1, 5)] for at in begins]  # over several tokens
        stop_ids = random.choice(whole.token_ids, int(seed % 2 == 0)).tolist()
        request = Request(
            prompt=prompt,
            max_new_tokens=NEW,
            stop=(*stop, "never said"),
            stop_ids=(*stop_ids, 257),
        )
        found.append((request, cut(request, whole.token_ids)))
    none = Request(prompt=PROMPTS[0], max_new_tokens=NEW)
    return [*found, (none, cut(none, wholes[0].token_ids))]


@pytest.mark.parametrize("batch_size", [4, *long(1)])
def test_every_strategy_cuts_at_the_same_place(
    model, tokenizer, single, cases, strategy, batch_size
):
    engine = single if batch_size == 1 else Engine(model, tokenizer, batch_size=batch_size)
    engine.use(strategy)
    found = engine.generate([request for request, _ in cases])
    for (request, expected), c in zip(cases, found, strict=True):
        assert (c.text, c.token_ids, c.finish_reason) == expected, request
        assert c.accepted <= c.drafted and c.num_new_tokens == len(c.token_ids)
    if strategy.num_draft_tokens:
        inside = [c for c in found if c.finish_reason == "stop" and c.trace.accepted_n[-1]]
        assert inside, "nothing was cut inside accepted drafts"


def test_the_cases_have_stops_of_both_kinds(cases):
    """Else the test above would say nothing."""
    reasons = [reason for _, (_, _, reason) in cases]
    assert reasons.count("stop") > 8 and reasons.count("length") > 3
    last = [ids[-1] in request.stop_ids for request, (_, ids, reason) in cases if reason == "stop"]
    assert any(last) and not all(last)
