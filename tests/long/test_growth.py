"""Streams and conversations that outgrow their cache. Long: each size of the cache is compiled."""

import pytest

from lsjax.decoding.batching import Conversation
from lsjax.decoding.engine import Engine
from lsjax.decoding.strategy import Autoregressive
from tests.decoding.test_growth import REQUESTS, STRATEGY, make_caches_small, same


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    make_caches_small(monkeypatch)


def test_one_row(shallow, tokenizer):
    """Without drafts, and without a batch to enter."""
    grown = Engine(shallow, tokenizer, Autoregressive())
    roomy = Engine(shallow, tokenizer, Autoregressive(), min_capacity=128)
    same(grown.generate(REQUESTS), roomy.generate(REQUESTS))


def test_streams_and_stops(shallow, tokenizer):
    """Pieces of a stream, and a stop string that is found after two growths."""
    grown = Engine(shallow, tokenizer, STRATEGY)
    roomy = Engine(shallow, tokenizer, STRATEGY, min_capacity=128)
    options = dict(max_new_tokens=70, log_probs=True)
    (whole,) = roomy.generate([[1, 2, 3]], **options)
    *pieces, done = grown.stream([1, 2, 3], **options)
    same([done], [whole])
    assert "".join(pieces) == whole.text
    at = len(tokenizer.decode(whole.token_ids[:65]))
    stop = next(
        whole.text[i : i + 2]
        for i in range(at, len(whole.text) - 1)
        if whole.text.find(whole.text[i : i + 2]) == i
    )
    same(
        [list(grown.stream([1, 2, 3], stop=(stop,), **options))[-1]],
        roomy.generate([[1, 2, 3]], stop=(stop,), **options),
    )


def test_conversation(shallow, tokenizer):
    """The cache of a turn that has grown twice is kept, and the next turn grows it once more."""
    engine, kept = Engine(shallow, tokenizer, STRATEGY), Conversation()
    fresh = Engine(shallow, tokenizer, STRATEGY, min_capacity=256)
    prompt = [1, 2, 3]
    for new in (66, 80):
        *_, done = engine.stream(prompt, conversation=kept, max_new_tokens=new)
        same([done], fresh.generate([prompt], max_new_tokens=new))
        prompt = [*prompt, *done.token_ids, 9]
        assert len(kept.ids) == len(prompt) - 2  # all but the pending token and the new one
