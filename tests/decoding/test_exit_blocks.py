"""Exit blocks change drafts, and nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import LlamaConfig
from lsjax.decoding import runtime
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import prefill
from lsjax.decoding.prompts import chunk_size
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.exit_blocks import with_exit_blocks, without_exit_blocks
from lsjax.model.llama import Llama, stacked
from lsjax.model.parameters import named_leaves
from tests.marks import long

INF = float("inf")
# Every source is used: each is the cheapest at one of the lengths.
SECONDS = ((1.0, 1.01, 1.02), (INF, 1.1, 1.5), (INF, 1.2, 1.4))
VOCABULARY = DraftVocabulary(np.arange(0, 258, 2))
PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [104, 105] * 9, [9, 8]]
STRATEGIES = {
    "static": SelfSpeculative(2, 3),
    "confidence": SelfSpeculative(1, 4, VOCABULARY, draft_confidence=0.02),
    "auto": Adaptive((1, 2), lengths=(0, 2, 5), seconds=SECONDS),
    "without": SelfSpeculative(3, 2),  # an exit without a block
}


@pytest.fixture(scope="module")
def base() -> Llama:
    config = LlamaConfig.tiny(num_layers=4, init_std=0.2)
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def blocks(base):
    """Exit blocks with noise, so that they draft badly, but not as the exits do."""
    return noisy(with_exit_blocks(base, (1, 2)))


def noisy(model):
    """The model with other weights in its blocks."""

    def changed(leaf):
        key = jax.random.fold_in(jax.random.key(0), leaf.size)
        return leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype)

    found = without_exit_blocks(model)
    found.exit_blocks = jax.tree.map(changed, model.exit_blocks)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", ["static", "auto", "confidence", "without"])
@pytest.mark.parametrize("batch_size", [2, 1])
def test_texts_are_those_of_the_model_without_blocks(
    base, blocks, tokenizer, monkeypatch, name, batch_size
):
    """With refill and growth."""
    monkeypatch.setattr(runtime, "MIN_CAPACITY", 32)
    monkeypatch.setattr(runtime, "SLACK", 16)
    requests = [Request(prompt=prompt, max_new_tokens=60) for prompt in PROMPTS]
    plain = Engine(base, tokenizer, Autoregressive()).generate(requests)
    found = Engine(blocks, tokenizer, STRATEGIES[name], batch_size=batch_size).generate(requests)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert sum(one.drafted for one in found) > 0


@pytest.mark.long
def test_a_block_that_is_the_last_layer_drafts_like_the_model(base, tokenizer):
    """A copy of the layer above the last exit."""
    last = base.num_layers - 1
    model = with_exit_blocks(base, [last])
    engine = Engine(model, tokenizer, SelfSpeculative(last, 3))
    found = engine.generate(PROMPTS, max_new_tokens=30)
    assert all(one.accepted == one.drafted > 0 for one in found)
    silent = with_exit_blocks(base, [last], start="zero")
    engine = Engine(silent, tokenizer, SelfSpeculative(last, 3))
    plain = Engine(base, tokenizer, SelfSpeculative(last, 3))
    found, expected = (one.generate(PROMPTS, max_new_tokens=30) for one in (engine, plain))
    assert [one.accepted for one in found] == [one.accepted for one in expected]
    assert any(one.accepted < one.drafted for one in found)


@pytest.mark.parametrize("feed_forward", [True, *long(False)])
@pytest.mark.parametrize("name", ["static", *long("auto")])
def test_the_cache_of_a_block_is_that_of_the_text(base, name, feed_forward):
    """After drafts, rejections, lookups and rounds without drafts, a block's keys and values equal
    those of one pass over the committed text."""
    model = noisy(with_exit_blocks(base, (1, 2), feed_forward=feed_forward))
    strategy, capacity = STRATEGIES[name], 64
    requests = [Request(prompt=prompt, max_new_tokens=30) for prompt in PROMPTS]
    state = DecodeState.create(
        requests,
        cache=model.new_cache(len(requests), capacity, model.num_layers),
        capacity=capacity,
        learned=strategy.first_guess(len(requests)),
    )
    read = partial(prefill, depth=model.num_layers, exits=strategy.exits)
    state = jax.jit(partial(read, chunk=chunk_size(20, capacity)))(model, state, jnp.int32(0))
    arguments, round_ = strategy.arguments(model), jax.jit(strategy.round)
    pause = jax.jit(strategy.pause)
    for number in range(9):
        if name == "auto":  # each source in turn is the only one that is not infinitely slow
            forced = np.full((3, 3), INF, np.float32)
            forced[0, 0] = 1e6 if number % 4 else 1
            if number % 4:
                forced[number % 4 - 1, 1:] = 1, 2
            arguments = arguments.with_seconds(forced)
        state = round_(model, state, arguments)
        state = pause(model, state, np.int32(1))
    if name == "auto":
        ends = np.asarray(state.round_BS) > 0
        sources, drafted = np.asarray(state.source_BS)[ends], np.asarray(state.round_BS)[ends] > 1
        chosen = {(int(s), bool(d)) for s, d in zip(sources, drafted, strict=True)}
        assert {(1, True), (2, True), (0, True), (0, False)} <= chosen
    assert (np.asarray(state.length_B) > [len(prompt) + 8 for prompt in PROMPTS]).all()
    for exit_layer in strategy.exits:
        keys, values = expected(model, exit_layer, np.asarray(state.tokens_BS))
        for row, length in enumerate(np.asarray(state.length_B) - 1):
            found = (
                state.cache.block_keys[f"{exit_layer}"],
                state.cache.block_values[f"{exit_layer}"],
            )
            for own, other in zip(found, (keys, values), strict=True):
                np.testing.assert_allclose(
                    own[row, :, :length], other[row, :, :length], rtol=0, atol=1e-5
                )


def expected(model, exit_layer, tokens_BS):
    """Keys and values of a block in one pass."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    cache = model.new_cache(*tokens_BS.shape, model.num_layers)
    x_BSD = model.embed(jnp.asarray(tokens_BS), positions_BS)
    x_BSD, cache = model.run_layers(x_BSD, 0, exit_layer, positions_BS, cache)
    _, cache = model.draft_state(exit_layer, x_BSD, positions_BS, cache)
    return cache.block_keys[f"{exit_layer}"], cache.block_values[f"{exit_layer}"]


@pytest.mark.long
def test_turns_of_a_conversation_share_the_cache_of_blocks(blocks, tokenizer):
    """A turn drafts as it does without the cache of the turn before, by another strategy too."""
    engine = Engine(blocks, tokenizer, STRATEGIES["static"])
    shared, ids = Conversation(), [1, 2, 3]
    for turn in range(4):
        engine.use(Autoregressive() if turn == 2 else STRATEGIES["static"])
        request = Request(prompt=ids, max_new_tokens=12)
        *_, last = engine.watch(ids, conversation=shared, max_new_tokens=12)
        (alone,) = engine.generate([request])
        one = last.completion
        assert (one.token_ids, one.accepted) == (alone.token_ids, alone.accepted)
        ids = [*ids, *one.token_ids, 5]


def test_a_model_without_its_blocks_is_the_one_before(base, blocks):
    own, before = named_leaves(without_exit_blocks(blocks)), named_leaves(base)
    assert own.keys() == before.keys() and all(own[name] is before[name] for name in own)


def test_exits_that_a_model_lacks(base):
    with pytest.raises(ValueError, match="exit block 4 is out of range: use 1..3"):
        with_exit_blocks(base, [4])


def test_parts_of_a_block(base):
    """Stacked or not, the same blocks; without a feed-forward part, none of its weights."""
    for one in (base, stacked(base)):
        names = [name for name in named_leaves(with_exit_blocks(one, [2])) if "exit_blocks" in name]
        leaves = named_leaves(with_exit_blocks(one, [2]))
        own = named_leaves(base.layers[2])
        for name in names:
            other = own[name.removeprefix("exit_blocks.2.")]
            np.testing.assert_array_equal(leaves[name], other)
        short = named_leaves(with_exit_blocks(one, [2], feed_forward=False))
        gone = {name for name in names if name not in short}
        assert gone == {name for name in names if "feed_forward" in name} != set()
