"""Batches whose requests or rows change while they decode."""

import jax
import numpy as np
import pytest

from lsjax.config import ConfigError, Sampling
from lsjax.decoding import runtime
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.calls import Calls
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import fill
from lsjax.decoding.prompts import Prompts, side_by_side
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from tests.marks import long

STRATEGY = SelfSpeculative(1, 3)
PROMPTS = [
    Request(prompt=prompt, max_new_tokens=new)
    for prompt, new in (([7], 60), ([1, 2, 3], 4), ([40] * 9, 40), ([9, 8], 5), ([3], 9), ([4], 3))
]


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, STRATEGY, batch_size=4, ignore_end=True)


@pytest.fixture(scope="module")
def expected(engine):
    return [one.token_ids for one in engine.generate(PROMPTS)]


@pytest.mark.parametrize("strategy", [STRATEGY, *long(Autoregressive())], ids=lambda s: s.name)
def test_ended_rows_leave_the_batch(model, tokenizer, expected, strategy):
    """Six texts share four rows. Once none waits, the batch has as many rows as run, rounded up to
    a power of two."""
    engine = Engine(model, tokenizer, strategy, batch_size=4, ignore_end=True, long_lived=True)
    batch = engine.batch(PROMPTS)
    run, rows, found = batch._run, [], {}

    def spying(function, state, *rest):
        state = run(function, state, *rest)
        if function is batch._calls.loop:
            rows.append((len(state.finish_B), len(batch._rows), len(batch._waiting)))
        return state

    batch._run = spying
    for update in batch.updates():
        found[update.index] = update.completion
    assert [found[index].token_ids for index in range(len(PROMPTS))] == expected
    assert {width for width, _, _ in rows} == {4, 2, 1}
    assert all(width == 4 or not waiting for width, _, waiting in rows)
    assert all(
        width == {1: 1, 2: 2, 3: 4, 4: 4}[running]
        for width, running, waiting in rows
        if not waiting
    )


def test_prompts_are_read_side_by_side(model, tokenizer):
    """Twelve texts of four prompts share four rows: equal prompts are read once, and those of other
    sizes by themselves. The texts are those of an engine that reads one prompt at a time."""
    prompts = [[7, 8, 9], [40] * 9, [5] * 50, [3]]
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=6 + 9 * (text % 2),
            sampling=Sampling(temperature=1.0, seed=10 * index + text),
        )
        for index, prompt in enumerate(prompts)
        for text in range(3)
    ]
    plain = Engine(model, tokenizer, STRATEGY, batch_size=4, ignore_end=True)
    expected = [one.token_ids for one in plain.generate(requests)]
    engine = Engine(model, tokenizer, STRATEGY, batch_size=4, ignore_end=True, long_lived=True)
    batch = engine.batch(requests)
    run, read = batch._run, []

    def spying(function, *given):
        if function.func is fill:
            prompts = given[-1]
            slots = given[0].capacity
            read.append((prompts.tokens_US.shape, np.asarray(prompts.source_B).tolist(), slots))
        return run(function, *given)

    batch._run = spying
    found = {update.index: update.completion.token_ids for update in batch.updates()}
    assert [found[index] for index in range(12)] == expected
    # Three texts of the first prompt and one of the second begin side by side, in rows with slots
    # for 65 tokens and a draft.
    assert read[0] == ((2, 32), [0, 0, 0, 1], 128 + 64)
    assert {shape[1] for shape, *_ in read} == {32, 64}
    assert sum(np.sum(np.array(source) >= 0) for _, source, _ in read) == 12


def test_a_chunk_of_many_prompts_has_a_limit():
    """2,048 tokens; a prompt has at least 32 of them, and no more slots than its row."""
    one, many = (Request(prompt=[1] * 400), [Request(prompt=[n] * 400) for n in range(16)])
    alone = Prompts.of({2: one}, 4, 320 + 256, 1)
    assert (alone.tokens_US.shape, alone.chunk) == ((1, 512), 512)
    assert alone.source_B.tolist() == [-1, -1, 0, -1]
    prompts = Prompts.of(dict(enumerate(many)), 16, 448, 1)
    assert (prompts.tokens_US.shape, prompts.chunk) == ((16, 448), 128)
    short = Prompts.of({n: Request(prompt=[n]) for n in range(3)}, 4, 128, 6)
    assert (short.tokens_US.shape, short.chunk) == ((6, 32), 32)
    assert short.length_U.tolist() == [1] * 6


def test_a_call_reads_prompts_of_similar_length_up_to_a_limit():
    """8,192 tokens: 16 prompts of 512 slots. Rows with the same prompt stay together."""
    lengths = [300 + row % 40 for row in range(80)]
    taken = {row: (9, Request(prompt=[3] * length)) for row, length in enumerate([*lengths, 20])}
    parts = [sorted(part) for part in side_by_side(taken)]
    assert [len(part) for part in parts] == [32, 32, 16, 1]
    assert parts[0] == [*range(16), *range(40, 56)]
    assert parts[-1] == [80]


def test_memory_of_prompts_that_are_read_side_by_side(model, tokenizer, monkeypatch):
    """2 layers of 2 K/V heads of 16 numbers, keys and values, 4 bytes: 512 bytes a slot. 4 rows of
    320 slots for 200 new tokens, and 8,192 slots beside them. By itself a prompt has one row."""
    slots = {False: (4 + 1) * 320, True: (4 + 26) * 320}  # 256 and 64
    for long_lived, needed in slots.items():
        engine = Engine(model, tokenizer, batch_size=4, long_lived=long_lived)
        monkeypatch.setattr(runtime, "free_memory", lambda needed=needed: 512 * needed)
        engine.batch([[1]], max_new_tokens=200)
        monkeypatch.setattr(runtime, "free_memory", lambda needed=needed: 512 * needed - 1)
        with pytest.raises(ConfigError, match="texts of 201 tokens needs"):
            engine.batch([[1]], max_new_tokens=200)


def test_side_by_side_no_cache_is_copied(model, tokenizer):
    """The program needs room for the prompts, and not for another cache of the rows."""
    engine = Engine(model, tokenizer, Autoregressive(), batch_size=16, long_lived=True)
    requests = [Request(prompt=[1, 2, row % 4], max_new_tokens=500) for row in range(16)]
    calls = Calls(engine.runtime, engine.strategy, requests, ends=(), most=None)
    state = calls.empty_rows(16, calls.capacity(900))
    call = calls.filling(dict(enumerate(enumerate(requests))), state)
    memory = engine.programs.lower(*call).compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 4


def test_requests_are_added_while_others_run(engine, expected):
    """Each text that ends asks for the next one, among them a prompt that outgrows the cache."""
    batch, found, added = engine.batch(PROMPTS[:2]), {}, 2
    for update in batch.updates():
        found[update.index] = update.completion.token_ids
        if added < len(PROMPTS):
            assert batch.add(PROMPTS[added]) == added
            added += 1
    assert [found[index] for index in range(len(PROMPTS))] == expected
    batch = engine.batch(PROMPTS[:1])
    long_one = Request(prompt=[5] * 400, max_new_tokens=6)
    assert batch.add(long_one) == 1
    found = {update.index: update.completion.token_ids for update in batch.updates()}
    (alone,) = engine.generate([long_one])
    assert found == {0: expected[0], 1: alone.token_ids}


def test_a_shorter_prompt_is_added_to_a_single_row(shallow, tokenizer):
    """Its cache is smaller than that of the first prompt."""
    strategy = Adaptive((1,), lengths=(0, 2), seconds=((1.0, 1.1), (1.0, 1.1)))
    engine = Engine(shallow, tokenizer, strategy, ignore_end=True)
    prompts = [Request(prompt=[5] * length, max_new_tokens=6) for length in (400, 3)]
    expected = [engine.generate([prompt])[0].token_ids for prompt in prompts]
    batch = engine.batch(prompts[:1])
    assert batch.add(prompts[1]) == 1
    assert [update.completion.token_ids for update in batch.updates()] == expected


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(sampling=Sampling(temperature=1.0)), "must have options that others"),
        (dict(log_probs=True), "must have options that others"),
        (dict(max_new_tokens=9_000), "do not fit the length of"),
    ],
)
def test_requests_that_cannot_be_added(engine, expected, options, words):
    """They are refused, and the others go on."""
    batch = engine.batch(PROMPTS[:1])
    with pytest.raises(ConfigError, match=words):
        batch.add([1, 2], **options)
    assert [update.completion.token_ids for update in batch.updates()] == expected[:1]
    with pytest.raises(ConfigError, match="all texts of the batch have ended"):
        batch.add(PROMPTS[1])
