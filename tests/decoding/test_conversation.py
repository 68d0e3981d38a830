"""Texts that go on from one another: what is in the cache is not read again, and it is right."""

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.config import ConfigError
from lsjax.decoding.batching import ContinuousBatch
from lsjax.decoding.conversation import Conversation, shared_prefix
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.model.llama import Llama
from tests.marks import long

NEW = 12
SAID = [list(range(40, 60)), [1, 2, 3], [7], [200, 100, 5]]  # what the other one says in turn
by_name = pytest.mark.parametrize(
    "strategy", [Autoregressive(), SelfSpeculative(1, 4), *long(EarlyExit(1))]
)


@pytest.fixture(scope="module")
def fresh(model, tokenizer):
    """What the strategy says to a whole history, without any cache from before."""
    engine = Engine(model, tokenizer)

    def ids(strategy, history, new=NEW) -> list[int]:
        engine.use(strategy)
        return engine.generate([history], max_new_tokens=new)[0].token_ids

    return ids


@pytest.fixture(scope="module")
def one_engine(model, tokenizer):
    return Engine(model, tokenizer)


@pytest.fixture
def engine(one_engine):
    """Its programs are for all tests."""
    one_engine.use(Autoregressive())
    return one_engine


def say(engine, history, conversation, **options):
    """The completion of one more turn."""
    options = {"max_new_tokens": NEW} | options
    *_, last = engine.watch(history, conversation=conversation, **options)
    return last.completion


@by_name
def test_a_turn_says_what_the_whole_history_says(engine, fresh, count_prefilled, strategy):
    """And reads what is new only: what was said, and the last token of the answer before."""
    engine.use(strategy)
    counts, history, conversation = count_prefilled(engine), [], Conversation()
    for said in SAID:
        history = history + said
        answer = say(engine, history, conversation).token_ids
        assert answer == fresh(strategy, history)
        history = history + answer
    assert counts == [20, 3 + 1, 1 + 1, 3 + 1]


@pytest.mark.parametrize("looks", [1, 2])
@by_name
def test_a_turn_behind_an_interrupted_one(engine, fresh, count_prefilled, strategy, looks):
    """Its tokens up to there are the history, and in the cache."""
    engine.use(strategy)
    counts, conversation, asked = count_prefilled(engine), Conversation(), []

    def cancelled():
        asked.append(True)
        return len(asked) > looks

    broken = say(engine, SAID[0], conversation, max_new_tokens=100, cancelled=cancelled)
    assert broken.finish_reason == "interrupt"
    assert broken.token_ids == fresh(strategy, SAID[0], broken.num_new_tokens)
    assert looks <= broken.num_new_tokens < 50
    history = [*SAID[0], *broken.token_ids, *SAID[1]]
    assert say(engine, history, conversation).token_ids == fresh(strategy, history)
    assert counts == [20, 3 + 1]


def test_a_turn_that_was_left(engine, fresh, count_prefilled):
    """Whoever stops listening keeps the cache."""
    counts, conversation = count_prefilled(engine), Conversation()
    updates = engine.watch(SAID[0], conversation=conversation, max_new_tokens=100)
    heard = [next(updates) for _ in range(3)][-1].trace.tokens_n.tolist()
    updates.close()
    history = [*SAID[0], *heard, 9]
    assert say(engine, history, conversation).token_ids == fresh(Autoregressive(), history)
    assert counts == [20, 2]


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_program_that_was_broken_off(engine, fresh, count_prefilled, monkeypatch, place):
    """A Ctrl-C while a program runs: what it has consumed is not taken for a cache."""
    counts, conversation, run = count_prefilled(engine), Conversation(), ContinuousBatch._run
    first = say(engine, SAID[0], conversation).token_ids
    history = [*SAID[0], *first, *SAID[1]]

    def broken(self, function, *arguments):
        if place == "behind":
            run(self, function, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ContinuousBatch, "_run", broken)
        with pytest.raises(KeyboardInterrupt):
            say(engine, history, conversation)
    other = [*SAID[0], *first, *SAID[2]]
    assert say(engine, other, conversation).token_ids == fresh(Autoregressive(), other)
    assert counts[-1] == (2 if place == "before" else len(other))


def test_another_history(engine, fresh, count_prefilled):
    """What both begin with is kept: a changed message, the same one again, another chat."""
    counts, conversation = count_prefilled(engine), Conversation()
    for history in (
        [*SAID[0], 1, 2],
        [*SAID[0], 3, 2, 1],
        [*SAID[0], 3, 2, 1],
        SAID[0][:5],
        [9, 9],
    ):
        assert say(engine, history, conversation).token_ids == fresh(Autoregressive(), history)
    assert counts == [22, 3, 1, 1, 2]


@pytest.mark.long
def test_a_chat_longer_than_the_cache(engine, fresh, count_prefilled):
    """The cache grows, and what is in it stays."""
    counts, conversation = count_prefilled(engine), Conversation()
    history = np.random.default_rng(0).integers(0, 256, 480).tolist()
    for _ in range(4):  # the second turn ends behind slot 512
        answer = say(engine, history, conversation, max_new_tokens=20).token_ids
        assert answer == fresh(Autoregressive(), history, 20)
        history = [*history, *answer, 65]
    assert counts == [480, 2, 2, 2]


@pytest.mark.long
def test_a_cache_larger_than_a_turn_needs(engine, fresh, count_prefilled):
    """An earlier turn was longer. Most of this one is in its cache."""
    counts, conversation = count_prefilled(engine), Conversation()
    history = np.random.default_rng(0).integers(0, 256, 310).tolist()
    for length in (310, 300):  # the first needs 512 slots and more
        answer = say(engine, history[:length], conversation).token_ids
        assert answer == fresh(Autoregressive(), history[:length])
    short, long = (engine.runtime.capacity(n + NEW, engine.strategy) for n in (300, 310))
    assert counts == [310, 1] and short < long


def test_another_strategy(engine, fresh, count_prefilled):
    """A cache of as many layers stays, also for longer drafts; one of other layers does not."""
    counts, conversation, history = count_prefilled(engine), Conversation(), SAID[0]
    for strategy in (Autoregressive(), SelfSpeculative(1, 20), EarlyExit(1), EarlyExit(2)):
        engine.use(strategy)
        answer = say(engine, history, conversation).token_ids
        assert answer == fresh(strategy, history)
        history = [*history, *answer, 65]
    assert counts == [20, 2, 20 + 2 * 13, 20 + 3 * 13]


def test_another_model(model, tokenizer, fresh, count_prefilled):
    """Another model of the same shape reads again what the first one has read."""
    other = jax.jit(lambda: Llama(model.config, rngs=nnx.Rngs(1)))()
    engine, conversation = Engine(other, tokenizer), Conversation()
    counts = count_prefilled(engine)
    answer = say(engine, SAID[0], conversation).token_ids
    engine.use_model(model)
    history = [*SAID[0], *answer, 65]
    assert say(engine, history, conversation).token_ids == fresh(Autoregressive(), history)
    assert counts == [20, 20 + NEW + 1]


def test_a_refused_turn_costs_nothing(engine, count_prefilled):
    counts, conversation = count_prefilled(engine), Conversation()
    first = say(engine, SAID[0], conversation).token_ids
    with pytest.raises(ConfigError, match="do not fit"):
        say(engine, [1] * 2048, conversation)
    say(engine, [*SAID[0], *first, 65], conversation)
    assert counts == [20, 2]


def test_a_conversation_has_a_row_of_its_own(model, tokenizer):
    engine = Engine(model, tokenizer, batch_size=2)
    with pytest.raises(ConfigError, match="needs an engine with batch_size 1, not 2"):
        next(engine.watch([1], conversation=Conversation()))


@pytest.mark.parametrize(
    "known, ids, shared",
    [
        ([], [1], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 3], 2),  # the last one is to be read
        ([1, 2, 3, 4], [1, 2], 1),
        ([1, 5, 3], [1, 2, 3, 4], 1),
        ([5], [1], 0),
    ],
)
def test_shared_prefix(known, ids, shared):
    assert shared_prefix(known, ids) == shared
