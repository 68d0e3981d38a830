"""Texts that outgrow their cache, twice: the same as those that had room from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import ConfigError, Sampling
from lsjax.decoding import runtime as runtimes
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.llama import Llama
from lsjax.model.protocol import grow_cache
from tests.states import new_state

STRATEGY = SelfSpeculative(1, 3)
DRAWN = Sampling(temperature=1.0, seed=3)
REQUESTS = [
    Request(prompt=[1, 2, 3], max_new_tokens=60, log_probs=True),
    Request(prompt=[4] * 9, max_new_tokens=20, sampling=DRAWN),
    Request(prompt=[5, 6], max_new_tokens=70),
    Request(prompt=list(range(40)), max_new_tokens=9),  # longer than the first cache
    Request(prompt=[7] * 30, max_new_tokens=45, sampling=Sampling(repetition_penalty=1.3)),
]


@pytest.fixture
def small(monkeypatch):
    """Caches of 32, 64 and 128 slots, and 16 more for drafts."""
    monkeypatch.setattr(runtimes, "MIN_CAPACITY", 32)
    monkeypatch.setattr(runtimes, "SLACK", 16)


def same(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason and one.text == other.text
        assert (one.drafted, one.accepted) == (other.drafted, other.accepted)
        if other.log_probs is not None:
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("strategy, batch_size", [(STRATEGY, 2), (Autoregressive(), 1)])
@pytest.mark.parametrize("requests", [REQUESTS[2:4], REQUESTS], ids=["greedy", "all"])
def test_texts_and_refill(shallow, tokenizer, small, strategy, batch_size, requests):
    """Rows of a batch grow together; requests enter rows of every capacity."""
    grown = Engine(shallow, tokenizer, strategy, batch_size=batch_size)
    roomy = Engine(shallow, tokenizer, strategy, batch_size=batch_size, min_length=128)
    slots = [grown.runtime.capacity(length, strategy) for length in (3, 90)]
    assert slots == [48, 144] and roomy.runtime.capacity(3, strategy) == 144
    expected = roomy.generate(requests)
    same(grown.generate(requests), expected)
    programs = len(grown.programs)
    same(grown.generate(requests), expected)
    assert len(grown.programs) == programs  # nothing is compiled twice
    same(grown.generate(requests[-1:]), expected[-1:])  # a longer prompt is the first


@pytest.mark.long
def test_streams_and_stops(shallow, tokenizer, small):
    """Pieces of a stream, and a stop string that is found after two growths."""
    grown = Engine(shallow, tokenizer, STRATEGY)
    roomy = Engine(shallow, tokenizer, STRATEGY, min_length=128)
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


@pytest.mark.long
def test_conversation(shallow, tokenizer, small):
    """The cache of a turn that has grown twice is kept, and the next turn grows it once more."""
    engine, kept = Engine(shallow, tokenizer, STRATEGY), Conversation()
    fresh = Engine(shallow, tokenizer, STRATEGY, min_length=256)
    prompt = [1, 2, 3]
    for new in (66, 80):
        *_, done = engine.stream(prompt, conversation=kept, max_new_tokens=new)
        same([done], fresh.generate([prompt], max_new_tokens=new))
        prompt = [*prompt, *done.token_ids, 9]
        assert len(kept.ids) == len(prompt) - 2  # all but the pending token and the new one


def test_grown_state(config):
    """More slots behind those that there are; what is in them is kept."""
    state = new_state(
        config,
        [
            Request(prompt=[1, 2], max_new_tokens=5, log_probs=True),
            Request(prompt=[3], max_new_tokens=9),
        ],
        capacity=8,
        num_layers=2,
        dtype=jnp.float32,
    )
    model = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()
    grown = state.grown(20, grow_cache(model, state.cache, 20, 2))
    assert grown.capacity == grown.cache.keys[1].shape[2] == 20
    for name in ("tokens", "accepted", "replaced", "round", "log_probs"):
        before, after = (getattr(one, f"{name}_BS") for one in (state, grown))
        np.testing.assert_array_equal(after[:, :8], before)
        assert after.shape == (2, 20)


def test_memory_for_the_last_two_caches(model, tokenizer, monkeypatch):
    """2 layers of 2 K/V heads of 16 numbers, keys and values, 4 bytes: 512 bytes a slot."""
    engine = Engine(model, tokenizer)
    needed = 512 * (576 + 320)  # 512 and 64 slots, beside 256 and 64
    monkeypatch.setattr(runtimes, "free_memory", lambda: needed)
    engine.generate([[1]], max_new_tokens=400)
    monkeypatch.setattr(runtimes, "free_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match="texts of 401 tokens needs 0 MB .* lower --max-new"):
        engine.generate([[1]], max_new_tokens=400)
    engine.generate([[1]], max_new_tokens=200)  # one cache of 320
    engine.runtime.check_memory(2, 401, engine.strategy, held=1)
