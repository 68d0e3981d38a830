"""The model of docs/extending.md on two devices; run by test_eight_devices.py."""

import jax
import numpy as np
import pytest

import lsjax
from lsjax.decoding import runtime
from lsjax.decoding.programs import decode, insert, prefill
from tests.test_extending import NEW, OWN, PROMPTS, gpt_of_the_page


@pytest.fixture(scope="module")
def gpt(tokenizer):
    return gpt_of_the_page(tokenizer)


@pytest.fixture
def small_caches(monkeypatch):
    """Rows outgrow them."""
    monkeypatch.setattr(runtime, "MIN_CAPACITY", 16)
    monkeypatch.setattr(runtime, "SLACK", 16)


@pytest.fixture
def mesh():
    return lsjax.make_mesh(lsjax.MeshConfig(data=2), jax.devices()[:2])


def texts(engine, **options) -> list[list[int]]:
    done = engine.generate(PROMPTS, max_new_tokens=NEW, **options)
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("name", ["drafts", "auto", "vocabulary"])
def test_rows_on_two_devices(gpt, tokenizer, small_caches, mesh, name):
    """The texts of one device, with refill and growth. The cache is sharded by rows, and each
    program takes its memory over."""
    options = dict(batch_size=2, ignore_end=True)
    alone = texts(lsjax.Engine(gpt, tokenizer, OWN[name], **options))
    engine, seen, get = lsjax.Engine(gpt, tokenizer, OWN[name], mesh=mesh, **options), [], None
    get = engine.programs.get

    def watched(function, state, *rest):
        program = get(function, state, *rest)

        def call(state, *rest):
            result = program(state, *rest)
            if function.func in (decode, insert, prefill):
                seen.append(function.func)
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
            if function.func is decode:
                for leaf in jax.tree.leaves(result.cache):
                    assert leaf.sharding.spec[0] == "data" and len(leaf.sharding.device_set) == 2
            return result

        return call

    engine.programs.get = watched
    assert texts(engine) == alone
    assert {decode, insert, prefill} <= {*seen}
    drawn = lsjax.Sampling(temperature=1.0, seed=4)
    assert texts(engine, sampling=drawn) == texts(engine, sampling=drawn) != alone


def test_a_conversation_and_outputs_of_exits(gpt, tokenizer, mesh):
    """A second turn reads only what is new; exits say the same as on one device."""
    found = []
    for where in (None, mesh):
        engine = lsjax.Engine(gpt, tokenizer, OWN["drafts"], mesh=where, ignore_end=True)
        kept, starts, get = lsjax.Conversation(), [], engine.programs.get

        def watched(function, state, *rest, get=get, starts=starts):
            program = get(function, state, *rest)
            if function.func is not prefill:
                return program
            return lambda state, start: (starts.append(int(start)), program(state, start))[1]

        engine.programs.get = watched
        options = dict(conversation=kept, max_new_tokens=9, exits=(2, 4))
        *_, first = engine.stream([1, 2, 3], **options)
        *_, second = engine.stream([1, 2, 3, *first.token_ids, 7], **options)
        assert starts[0] == 0 and starts[1] >= 3 + 8
        found.append((first, second))
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        for exit_layer in (2, 4):
            for name in ("hidden_nD", "top_probs_n", "log_probs_n"):
                pair = (getattr(text.exits[exit_layer], name) for text in (one, other))
                np.testing.assert_allclose(*pair, atol=1e-4)
