"""Texts that outgrow their cache, twice: the same as those that had room from the start."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.decoding import engine as engines
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState

STRATEGY = SelfSpeculative(1, 3)
DRAWN = Sampling(temperature=1.0, seed=3)
REQUESTS = [
    Request(prompt=[1, 2, 3], max_new_tokens=60, log_probs=True),
    Request(prompt=[4] * 9, max_new_tokens=20, sampling=DRAWN),
    Request(prompt=[5, 6], max_new_tokens=70),
    Request(prompt=list(range(40)), max_new_tokens=9),  # longer than the first cache
    Request(prompt=[7] * 30, max_new_tokens=45, sampling=Sampling(repetition_penalty=1.3)),
]


def make_caches_small(monkeypatch) -> None:
    """Caches of 32, 64 and 128 slots, and 16 more for drafts."""
    monkeypatch.setattr(engines, "MIN_CAPACITY", 32)
    monkeypatch.setattr(engines, "SLACK", 16)


def same(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason and one.text == other.text
        assert (one.drafted, one.accepted) == (other.drafted, other.accepted)
        if other.log_probs is not None:
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_texts_and_refill(shallow, tokenizer, monkeypatch):
    """Rows of a batch grow together; requests enter rows of every capacity.
    tests/long/test_growth.py has streams and conversations."""
    make_caches_small(monkeypatch)
    grown = Engine(shallow, tokenizer, STRATEGY, batch_size=2)
    roomy = Engine(shallow, tokenizer, STRATEGY, batch_size=2, min_capacity=128)
    assert grown.capacity(3) == 48 and grown.capacity(90) == 144 == roomy.capacity(3)
    expected = roomy.generate(REQUESTS)
    same(grown.generate(REQUESTS), expected)
    programs = len(grown.programs)
    same(grown.generate(REQUESTS), expected)
    assert len(grown.programs) == programs  # nothing is compiled twice
    same(grown.generate(REQUESTS[3:]), expected[3:])  # a longer prompt is the first


def test_grown_state(config):
    """More slots behind those that there are; what is in them is kept."""
    state = DecodeState.create(
        config,
        [
            Request(prompt=[1, 2], max_new_tokens=5, log_probs=True),
            Request(prompt=[3], max_new_tokens=9),
        ],
        capacity=8,
        num_layers=2,
        dtype=jnp.float32,
    )
    grown = state.grown(20)
    assert grown.capacity == grown.cache.capacity == 20
    for name in ("tokens", "accepted", "replaced", "round", "log_probs"):
        before, after = (getattr(one, f"{name}_BS") for one in (state, grown))
        np.testing.assert_array_equal(after[:, :8], before)
        assert after.shape == (2, 20)


def test_memory_for_the_last_two_caches(model, tokenizer, monkeypatch):
    """4 layers of 2 K/V heads of 16 numbers, keys and values, 4 bytes: 1,024 bytes a slot."""
    engine = Engine(model, tokenizer)
    needed = 1024 * (576 + 320)  # 512 and 64 slots, beside 256 and 64
    monkeypatch.setattr(engines, "free_memory", lambda: needed)
    engine.generate([[1]], max_new_tokens=400)
    monkeypatch.setattr(engines, "free_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match="texts of 401 tokens needs 1 MB .* lower --max-new"):
        engine.generate([[1]], max_new_tokens=400)
    engine.generate([[1]], max_new_tokens=200)  # one cache of 320
    engine.check_memory(2, 401, held=1)
