"""The strategy that chooses its drafts: exact whatever it chooses, and what it learns."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import ConfigError, LlamaConfig, Sampling
from lsjax.decoding import runtime, stopwatch
from lsjax.decoding.acceptance import Verified
from lsjax.decoding.auto import measure as measuring
from lsjax.decoding.auto.adaptive import Adaptive, AutoArguments
from lsjax.decoding.auto.choose import choose, seconds_of_drafts
from lsjax.decoding.auto.learned import (
    AGREEMENT_COUNT,
    DECAY,
    IDLE_TOKENS,
    LOOKUP_CHANCES,
    MOST_IDLE_TOKENS,
    TEXT_COUNT,
    USUAL_CHANCES,
    USUAL_COUNT,
    Counts,
    Learned,
    expected_counts,
    expected_drafts,
    idle_tokens,
    in_turn,
)
from lsjax.decoding.auto.lookup import LONGEST
from lsjax.decoding.auto.scores import scores
from lsjax.decoding.batching import ContinuousBatch
from lsjax.decoding.confidence import Together
from lsjax.decoding.draft import Draft
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import decode, pause
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.llama import Llama
from tests.states import new_state
from tests.tunings import tune

LENGTHS, EXITS = (0, 2, 5), (1, 2, 3)
CAPACITY = -4  # index of a cache's slots in what seconds depend on
SAME = ((1.0,) * 3, *[(math.inf, 1.0, 1.0)] * 3)
PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 17, [5] * 9, list(b"a = b; a = b; a")]


def only(source: int, index: int):
    """Seconds that allow one choice."""
    seconds = np.full((4, 3), math.inf)
    seconds[source, index] = 1.0
    return tuple(map(tuple, seconds.tolist()))


def adaptive(seconds=SAME, vocabulary=None):
    return Adaptive(EXITS, vocabulary, lengths=LENGTHS, seconds=seconds)


LOOKUPS = Adaptive(lengths=LENGTHS, seconds=(SAME[0],))


@pytest.fixture(scope="module")
def model(deep):
    return deep


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, batch_size=3)


def generate(engine, strategy, prompts=PROMPTS, **options):
    engine.use(strategy)
    return engine.generate(prompts, **{"max_new_tokens": 30, **options})


@pytest.fixture(scope="module")
def expected(engine):
    return [one.token_ids for one in generate(engine, Autoregressive())]


@pytest.mark.parametrize(
    "source, index", [(0, 0), *((source, index) for source in range(4) for index in (1, 2))]
)
def test_every_choice_gives_the_same_tokens(engine, expected, source, index):
    """In a batch of three rows that six prompts share; the trace tells which choice was made."""
    found = generate(engine, adaptive(only(source, index)))
    assert [one.token_ids for one in found] == expected
    name = f"exit {EXITS[source - 1]}" if source else "lookup" if index else "none"
    assert {name} <= {n for one in found for n in one.sources} <= {name, "none"}


def test_the_same_tokens_with_whatever_is_chosen(engine, expected):
    """Costs under which the choice changes, in one program that is compiled once."""
    programs = None
    for seed in range(4):
        random = np.random.default_rng(seed)
        seconds = random.uniform(0.8, 1.6, (4, 3))
        seconds[1:, 0] = math.inf
        strategy = adaptive(tuple(map(tuple, seconds.tolist())))
        found = generate(engine, strategy)
        assert [one.token_ids for one in found] == expected
        chosen = {name for one in found for name in one.sources}
        assert len(chosen) > 1
        assert sum(s["tokens"] for one in found for s in one.sources.values()) == 6 * 29
        programs = programs or len(engine.programs)
    assert len(engine.programs) == programs


@pytest.fixture
def on_tpus(monkeypatch):
    """Rounds as on accelerators, with one verification."""
    tune(monkeypatch, positions_are_free=True)


EVERY = np.int32(1_000)  # tokens of a pause


def test_pauses_by_hand(shallow):
    """A round that drafts nothing ends a call; the pause then appends four tokens, and twice as
    many after the next one. A call goes on only after the pause. One with drafts does neither."""
    requests = [Request(prompt=prompt, max_new_tokens=60) for prompt in PROMPTS[:2]]
    lengths = np.array([len(prompt) for prompt in PROMPTS[:2]])
    first = new_state(
        shallow.config,
        requests,
        capacity=128,
        num_layers=2,
        dtype=shallow.dtype,
        learned=LOOKUPS.first_guess(2),
    )
    run, wait = (jax.jit(partial(function, strategy=LOOKUPS)) for function in (decode, pause))

    seconds_QJ = [AutoArguments(jnp.array(only(0, index)[:1]), None) for index in range(2)]

    def lengths_after(state, index, most=EVERY):
        """New tokens of the two rows, after a call with up to five rounds and after a pause."""
        # The prompts were not read: only the numbers of tokens matter here.
        for step in (partial(run, rounds=5, arguments=seconds_QJ[index]), partial(wait, most=most)):
            state = step(shallow, state)
            yield state, list(state.length_B - lengths)

    (_, one), (state, four) = lengths_after(first, 0)
    assert [one, four] == [[1] * 2, [1 + IDLE_TOKENS] * 2]
    (_, one), (state, three) = lengths_after(state, 0, most=np.int32(3))
    assert [one, three] == [[2 + IDLE_TOKENS] * 2, [5 + IDLE_TOKENS] * 2]
    (_, none), (state, rest) = lengths_after(state, 0)
    assert [none, rest] == [[5 + IDLE_TOKENS] * 2, [2 + 3 * IDLE_TOKENS] * 2]
    (_, drafted), (state, paused) = lengths_after(state, 1)
    assert min(drafted) >= 7 + 3 * IDLE_TOKENS and paused == drafted
    assert not state.learned.idle_B.any()


def test_idle_tokens_by_hand():
    found = idle_tokens(jnp.arange(7))
    expected = [0, *IDLE_TOKENS * np.array([1, 2, 4]), *[MOST_IDLE_TOKENS] * 3]
    assert found.tolist() == expected


@pytest.mark.long
def test_pauses_are_measured_with_the_round_before_them(shallow, tokenizer, monkeypatch):
    """Each call without drafts makes a token and those of the pause, whatever rounds it may run."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measuring, "REPEATS", 1)
    strategy = dataclasses.replace(LOOKUPS, seconds=None)
    started = Engine(shallow, tokenizer, strategy).runtime.stopwatch(strategy, 1, 320)
    # A call takes one tick, and so does one without rounds: the floor, over the tokens or rounds.
    seconds_QJ = measuring.measure(started, strategy.arguments(shallow), 1000.0)
    np.testing.assert_allclose(seconds_QJ[0, 0], 1e-9 / (1 + IDLE_TOKENS))
    assert (seconds_QJ[0, 1:] >= 1e-9 / measuring.MOST_ROUNDS).all()


@pytest.mark.long
def test_lookups_are_timed_with_drafts(shallow, tokenizer):
    """Also in sampling, where lookups may draft tokens of the vocabulary only."""
    vocabulary = DraftVocabulary(np.arange(50, 90, dtype=np.int32))
    strategy = Adaptive((1,), vocabulary, lengths=LENGTHS)
    serves = [Request(prompt=(1,), max_new_tokens=9, sampling=Sampling(temperature=1.0))]
    watch = Engine(shallow, tokenizer, strategy).runtime.stopwatch(strategy, 1, 320, serves)
    seconds_QJ = jnp.array(only(0, 2)[:2], jnp.float32)
    watch.run(1, strategy.arguments(shallow).with_seconds(seconds_QJ))
    assert int(watch._state.round_BS.max()) == 1 + LENGTHS[-1]


@pytest.mark.long
@pytest.mark.parametrize("strategy", [LOOKUPS, adaptive(only(0, 0)), adaptive()])
def test_the_same_tokens_with_pauses(model, tokenizer, expected, strategy, on_tpus):
    engine = Engine(model, tokenizer, batch_size=3)
    found = generate(engine, strategy)
    assert [one.token_ids for one in found] == expected


@pytest.mark.long
def test_penalties_stops_log_probabilities_and_a_vocabulary(engine, model):
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=25,
            stop_ids=(9, 30, 77),
            log_probs=True,
            sampling=Sampling(repetition_penalty=1.3, no_repeat_ngram=3),
        )
        for prompt in PROMPTS
    ]
    plain = generate(engine, Autoregressive(), requests)
    found = generate(engine, adaptive(vocabulary=DraftVocabulary(np.arange(0, 258, 2))), requests)
    for one, other in zip(plain, found, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


@pytest.mark.long
def test_a_model_without_exits_looks_drafts_up(engine, expected):
    """Its text repeats itself: lookups save rounds."""
    found = generate(engine, LOOKUPS)
    assert [one.token_ids for one in found] == expected
    assert {name for one in found for name in one.sources} <= {"lookup", "none"}
    repeats = generate(engine, LOOKUPS, max_new_tokens=200)
    assert max(one.tokens_per_round for one in repeats) > 1.5


@pytest.mark.long
@pytest.mark.parametrize("strategy", [LOOKUPS, adaptive()])
def test_texts_of_a_seed_repeat(engine, strategy):
    """Whatever was decoded before."""
    options = dict(sampling=Sampling(temperature=0.8, seed=4))
    first = generate(engine, strategy, **options)
    generate(engine, strategy)
    again = generate(engine, strategy, **options)
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert len({tuple(one.token_ids) for one in first}) == 6


@pytest.mark.long
def test_counts_of_sampled_texts_are_finite(model):
    """Also if filters or a vocabulary give probability 0 to tokens."""
    strategy = adaptive(vocabulary=DraftVocabulary(np.arange(0, 258, 3)))
    sampling = Sampling(temperature=1.5, top_k=3, seed=4)
    state = new_state(
        model.config,
        [Request(prompt=prompt, max_new_tokens=60, sampling=sampling) for prompt in PROMPTS],
        capacity=128,
        num_layers=4,
        dtype=jnp.float32,
        learned=strategy.first_guess(len(PROMPTS)),
    )
    rounds = jax.jit(partial(decode, strategy=strategy))
    learned = rounds(model, state, np.int32(20), strategy.arguments(model)).learned
    for name, counts in dataclasses.asdict(learned).items():
        assert np.isfinite(counts).all(), name
    assert (learned.passed_BEZ <= learned.tried_BEZ).all() and (
        learned.tried_BEZ.sum((1, 2)) > 9
    ).all()
    assert (learned.rounds_B == 20).all()


TOP = [[0.99, 0.7, 0.5, 0.0], [0.3, 0.0, 0.0, 0.0]]
NEW = [[4, 5, 6, 0], [7, 0, 0, 0]]


@pytest.mark.parametrize("temperature", (0, 1))
def test_counts_of_the_exit_that_drafted_by_hand(model, temperature):
    """Exit 2 of (1, 2). Row 0: two of three drafts pass. Row 1: the draft stopped before its first
    token. Greedy drafts pass or fail. Sampled ones pass with min(1, q / p), and here q is p / 2."""
    strategy, sampling = Adaptive((1, 2)), Sampling(temperature=temperature)
    requests = [Request(prompt=[1], max_new_tokens=9, sampling=sampling)] * 2
    options = dict(capacity=128, num_layers=4, dtype=jnp.float32)
    state = new_state(model.config, requests, learned=strategy.first_guess(2), **options)
    tokens_BT, count_B = jnp.array([[4, 5, 9, 0], [7, 0, 0, 0]]), jnp.array([3, 0])
    logits_BTV = jax.random.normal(jax.random.key(0), (2, 4, model.config.vocab_size))
    log_q_BTV = jax.nn.log_softmax(logits_BTV) - math.log(2) if temperature else None
    draft = Draft(state, (), tokens_BT, count_B, log_q_BTV, None, jnp.array(TOP))
    states = [jnp.zeros((2, 4, model.config.hidden_size))] * 2
    rest = jnp.array(False), lambda: states, logits_BTV, jnp.array(NEW), jnp.array([2, 0])
    passed, tried = jax.jit(lambda: scores(model, strategy.exits, draft, 2, *rest))()
    assert not passed[:, 0].any() and not tried[:, 0].any()
    # The levels begin at 0, 0.4, 0.6, 0.8 and 0.95.
    np.testing.assert_array_equal(tried[:, 1], [[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    expected = [[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]
    if temperature:
        expected = [[0, 0.5, 0.5, 0, 0.5], [0.5, 0, 0, 0, 0]]
    np.testing.assert_allclose(passed[:, 1], expected, rtol=1e-5)


def test_rounds_that_are_far_apart_score_the_exits(model):
    """The fourth choice in a row to draft nothing has 32 tokens behind it."""
    strategy, tried = adaptive(only(0, 0)), []
    requests = [Request(prompt=[1], max_new_tokens=99)]
    options = dict(capacity=128, num_layers=4, dtype=jnp.float32, learned=strategy.first_guess(1))
    state, round_ = new_state(model.config, requests, **options), jax.jit(strategy.round)
    for _ in range(6):
        state = round_(model, state, strategy.arguments(model))
        tried.append(bool(state.learned.tried_BEZ.any()))
    assert strategy.scored_every(model) > 6
    assert tried == [False] * 4 + [True] * 2


def test_the_first_rounds_score_no_further_exits(model):
    """Seconds of rounds are measured in them. Scores would make the shortest ones look slow."""
    choice = 1, 1
    strategy = adaptive(only(*choice))
    requests = [Request(prompt=[1], max_new_tokens=99)]
    learned = strategy.first_guess(1)
    options = dict(capacity=128, num_layers=4, dtype=jnp.float32, learned=learned)
    state, every = new_state(model.config, requests, **options), strategy.scored_every(model)
    rounds = jax.jit(partial(decode, strategy=strategy))

    def others_tried(state):
        return np.delete(state.learned.tried_BEZ.sum(-1)[0], [choice[0] - 1] * (choice[0] > 0))

    before = rounds(model, state, np.int32(every - 1), strategy.arguments(model))
    assert not others_tried(before).any()
    assert others_tried(rounds(model, before, np.int32(1), strategy.arguments(model))).all()


def test_counts_by_hand():
    """Older counts weigh less. The lookup was right about row 0's first token; row 1 had none."""
    seen = Counts(np.arange(20.0).reshape(2, 2, 5), np.arange(1, 21.0).reshape(2, 2, 5))
    ones = map(jnp.ones, [(2, 2, 5)] * 2 + [(2, 8)] * 2)
    start = Learned(*ones, *jnp.array([[0, 0], [1, 1], [0, 0]]))
    verified = Verified(None, np.array(NEW), np.array([2, 0]), None, seen)
    given = verified, np.array([7, 0]), np.array([[4, 9, 6], [7, 0, 0]]), np.array(True)
    after = jax.jit(Learned.after)(start, *given)
    kept = DECAY ** seen[1].sum(2, keepdims=True)
    assert (after.rounds_B == 1).all() and (after.idle_B == 2).all()
    assert (after.wait_B == 2 * IDLE_TOKENS).all()
    np.testing.assert_allclose(after.passed_BEZ, kept + seen[0], rtol=1e-6)
    np.testing.assert_allclose(after.tried_BEZ, kept + seen[1], rtol=1e-6)
    # Seven tokens matched, then eight.
    looked, found = np.ones((2, 8)), np.ones((2, 8))
    kept = DECAY
    looked[0, 6], found[0, 6] = kept + 1, kept + 1
    looked[0, 7], found[0, 7] = kept + 1, kept
    np.testing.assert_allclose(after.lookup_tried_BM, looked, rtol=1e-6)
    np.testing.assert_allclose(after.lookup_passed_BM, found, rtol=1e-6)


def test_a_lesson_by_hand():
    """The counts of row 1, of at most 16 drafts of an exit."""
    tried_BEZ = np.zeros((2, 2, 5), np.float32)
    tried_BEZ[1] = [8, 8, 4, 12, 0], [1, 0, 2, 0, 5]
    learned = Adaptive((1, 2)).first_guess(2)
    learned = dataclasses.replace(learned, passed_BEZ=tried_BEZ / 2, tried_BEZ=tried_BEZ)
    passed_EZ, tried_EZ = learned.lesson(1)
    np.testing.assert_array_equal(tried_EZ, [[4, 4, 2, 6, 0], [1, 0, 2, 0, 5]])
    np.testing.assert_array_equal(passed_EZ, tried_EZ / 2)
    later = Adaptive((1, 2)).first_guess(4, learned.lesson(1))
    np.testing.assert_array_equal(later.tried_BEZ, [tried_EZ / 4] * 4)
    np.testing.assert_array_equal(later.passed_BEZ, [passed_EZ / 4] * 4)
    assert not later.lookup_tried_BM.any() and not later.rounds_B.any()


@pytest.mark.parametrize(("temperature", "learns"), [(0.0, True), (1.0, False)])
def test_a_greedy_text_learns_from_the_last_one(model, tokenizer, temperature, learns):
    """Exit 1 of a random model drafts badly. The first text finds out, and the second one knows. A
    sampled text repeats."""
    seconds = ((1.0, math.inf, math.inf), (1.02, 1.8, 2.6))
    strategy = Adaptive((1,), lengths=LENGTHS, seconds=seconds)
    sampling = Sampling(temperature=temperature)
    engine = Engine(model, tokenizer, strategy)
    first, second = (
        one
        for _ in range(2)
        for one in engine.generate(PROMPTS[:1], max_new_tokens=40, sampling=sampling)
    )
    assert first.token_ids == second.token_ids
    assert first.sources["exit 1"]["rounds"] > 0
    if learns:
        assert second.sources == {"none": {"rounds": 39, "tokens": 39}}
    else:
        assert second.sources == first.sources


def test_seconds_of_more_work_are_no_fewer_by_hand():
    """A row for lookups, then exits. Choices that were not measured stay infinite."""
    given = [[5.0, 4.0, 9.0], [4.0, math.inf, 8.0], [6.0, 7.0, 10.0]]
    expected = [[5.0, 5.0, 9.0], [5.0, math.inf, 9.0], [6.0, 7.0, 10.0]]
    np.testing.assert_array_equal(measuring.ordered(np.array(given)), expected)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        # The first draft costs 6 seconds for 1 + 1/2 tokens, the third one 12 for 1 + 1/2 + 1/4.
        ((4.0, 10.0, 22.0), (4, 3, 12 / 1.75, 3, 3, math.inf)),
        # Five drafts hardly cost more than two: 18 seconds for 1.9375 tokens, not 16 for 1.5.
        ((4.0, 20.0, 22.0), (18 / 1.9375, 0, 2 / 1.75, 0, 0, math.inf)),
        # Rounds of five drafts were not measured, or those without.
        ((4.0, 10.0, math.inf), (4, 0, math.inf, 0, 0, math.inf)),
        ((math.inf, 10.0, 22.0), (3, 3, 12 / 1.75, 3, 3, math.inf)),
    ],
)
def test_seconds_of_drafts_by_hand(rounds, expected):
    """Rounds of 0, 2 and 5 drafts, whose verifications take 2, 4 and 7 seconds. If those of 2 and 5
    differ by 12 seconds, a draft costs (12 - 3) / 3."""
    given = rounds, [2.0, 4.0, 7.0], expected_drafts(jnp.array(0.5), LENGTHS, 0.0)
    run = jax.jit(seconds_of_drafts, static_argnums=0)
    found = run(LENGTHS, *map(np.array, given))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_later_drafts_by_hand():
    """Half of the first drafts are rejected, a quarter of the second ones, and a sixth of the third
    ones. Greedy drafts pass with the same chance each."""
    chance = jnp.array(0.5)
    np.testing.assert_allclose(in_turn(chance, 3, 1.0), [1 / 2, 3 / 4, 5 / 6], rtol=1e-6)
    found = expected_drafts(chance, (0, 2, 3), 1.0)
    rows = [[0, 1 + 3 / 4, 1 + 3 / 4 + 5 / 8], [0, 1, 1 + 5 / 6], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(found, rows, rtol=1e-6)
    greedy = [[0, 1.5, 1.75], [0, 1, 1.5], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(expected_drafts(chance, (0, 2, 3), 0.0), greedy, rtol=1e-6)


def test_dear_drafts_are_shorter(engine, expected):
    """Exit 3 is always taken. Where drafts take time, unsure ones end early."""
    lengths = []
    for dear in (0.0, 0.03):
        seconds = np.full((4, 3), math.inf)
        seconds[0], seconds[3, 1:] = (1.0, 1.0, 1.0), (0.1 + 2 * dear, 0.1 + 5 * dear)
        seconds[0] *= 100
        found = generate(engine, adaptive(tuple(map(tuple, seconds.tolist()))))
        assert [one.token_ids for one in found] == expected
        lengths.append(sum(one.drafted for one in found) / sum(one.rounds for one in found))
    assert 0 < lengths[1] < lengths[0] - 1


def test_scores_take_a_hundredth_of_the_bytes():
    """A head as large as 8 of 30 layers, scored at two exits: 100 * 16 / 38 rounds apart."""
    config = LlamaConfig.smollm2_135m()
    assert config.head_params / config.layer_params == pytest.approx(8, abs=0.01)
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert Adaptive((8, 15)).scored_every(model) == 43
    vocabulary = DraftVocabulary(np.arange(1024))
    assert Adaptive((8, 15), vocabulary).scored_every(model) == 4
    # Two exit blocks are read too. 100 * (2 * 0.29 + 2 * 1) / 38 = 6.8.
    blocks = jax.eval_shape(lambda model: with_exit_blocks(model, (8, 15)), model)
    assert Adaptive((8, 15), vocabulary).scored_every(blocks) == 7


def test_chances_by_hand():
    """One of three sure drafts failed. All pass less often than usual then, by 10 of 10.97: eight
    drafts weigh as usual beside them. Sure ones are more common."""
    unknown, sure = Learned.create(1, 1), (0, 0, 4)
    assert unknown.mean_chance_E[0] == pytest.approx(np.mean(USUAL_CHANCES))
    np.testing.assert_allclose(unknown.chances_EZ[0], USUAL_CHANCES, rtol=1e-6)
    known = dataclasses.replace(
        unknown,
        passed_BEZ=unknown.passed_BEZ.at[sure].set(2),
        tried_BEZ=unknown.tried_BEZ.at[sure].set(3),
    )
    *unsure, usual = np.array(USUAL_CHANCES) * 10 / (8 + 3 * 0.99)
    sure_chance = (2 + 2 * usual) / (3 + 2)
    expected = [*unsure, sure_chance]
    np.testing.assert_allclose(known.chances_EZ[0], expected, rtol=1e-6)
    mean = (0.5 * sum(unsure) + 3.5 * sure_chance) / 5.5
    assert known.mean_chance_E[0] == pytest.approx(mean)


def test_chances_that_are_higher_than_usual_stay_below_one():
    """Unsure drafts that all pass raise those of other levels, up to 0.99."""
    known = Learned.create(1, 1)
    unsure = np.zeros((1, 1, 5), np.float32)
    unsure[..., 0] = 24
    known = dataclasses.replace(known, passed_BEZ=unsure, tried_BEZ=unsure)
    factor = (24 + 8) / (24 * 0.25 + 8)
    expected = [(24 + 2 * 0.25 * factor) / 26, *[0.99] * 4]
    assert 0.5 * factor > 0.99
    np.testing.assert_allclose(known.chances_EZ[0], expected, rtol=1e-6)


@pytest.fixture
def divided():
    """An exit with two kinds of drafts, equally likely: those that pass with 0.1, and with 0.9."""
    tried_BEZ = np.array([[[1e6, 0, 0, 0, 1e6]]], np.float32)
    passed_BEZ = tried_BEZ * np.array([0.1, 0, 0, 0, 0.9], np.float32)
    return dataclasses.replace(Learned.create(1, 1), passed_BEZ=passed_BEZ, tried_BEZ=tried_BEZ)


@pytest.mark.parametrize(
    ("least", "share", "chance"), [(0.1, 1, 0.5), (0.2, 0.5, 0.9), (1.3, 0.5, 0.9), (1.4, 0, 0)]
)
def test_tokens_of_exits_by_hand(divided, least, share, chance):
    """If the first of two drafts passes, 1 + 1/2 are expected to: 0.15 or 1.35 beforehand."""
    tokens = jax.jit(Learned.exit_tokens, static_argnums=(1, 3))
    tokens_EJ, drafts_EJ = tokens(divided, (0, 2), np.array([[0.0, least]]), 0.0)
    np.testing.assert_allclose(drafts_EJ, [[1, share]], atol=1e-4)
    np.testing.assert_allclose(tokens_EJ, [[1, 1 + share * chance * 1.5]], rtol=1e-4)


@pytest.mark.parametrize(("without", "chosen"), [(11.0, 2), (14.0, 0)])
def test_an_exit_that_is_rarely_sure_pays(model, divided, without, chosen):
    """An autoregressive round takes 10 seconds, and one with two drafts takes 20 for 1.75 tokens.

    But in half of the rounds the first draft stops the exit. So there are 1 + 0.5 * 1.35 tokens in
    (11 + 20) / 2 seconds. If 14 seconds pass without drafts, that is too slow."""
    request = Request(prompt=(1, 2, 3), max_new_tokens=20)
    options = dict(capacity=64, num_layers=4, dtype=jnp.float32, learned=divided)
    state = new_state(model.config, [request], **options)
    seconds_QJ = jnp.array([[10, math.inf], [without, 20.0]])
    strategy = Adaptive((2,), lengths=(0, 2))
    own = strategy.exits, strategy.lengths, 4, state
    choice = jax.jit(lambda: choose(*own, jnp.array([0]), seconds_QJ))()
    assert choice.exit_layer == chosen
    if chosen:
        # The first draft widens the verification by 9 seconds, for 1.5 tokens if it passes.
        rate = (1 + 0.5 * 1.35) / 15.5
        np.testing.assert_allclose(choice.confidence.least_T, [rate * 6, 0, 1], rtol=1e-4)


def test_rows_that_draft_together_deviate_less(divided):
    """A row's first draft promises 0.15 or 1.35 tokens, 0.75 in the mean. The mean of four rows
    deviates half as much: 0.45 or 1.05, and the exit drafts if that is 1 at least."""
    tokens = jax.jit(Learned.exit_tokens, static_argnums=(1, 3))
    tokens_EJ, drafts_EJ = tokens(divided, (0, 2), np.array([[0.0, 1.0]]), 0.0, 4)
    np.testing.assert_allclose(drafts_EJ, [[1, 0.5]], atol=1e-4)
    np.testing.assert_allclose(tokens_EJ, [[1, 1 + 0.5 * 1.05]], rtol=1e-4)


def test_rows_share_what_they_learn():
    """Row 0 has tried four sure drafts, of which three passed, and row 1 two, of which one did."""
    both, sure = Learned.create(2, 1), (slice(None), 0, 4)
    both = dataclasses.replace(
        both,
        passed_BEZ=both.passed_BEZ.at[sure].set(jnp.array([3.0, 1.0])),
        tried_BEZ=both.tried_BEZ.at[sure].set(jnp.array([4.0, 2.0])),
    )
    usual = 0.99 * (4 + 8) / (6 * 0.99 + 8)
    assert both.chances_EZ[0, 4] == pytest.approx((4 + 2 * usual) / (6 + 2))


@pytest.mark.parametrize("agreement", [0.1, 0.3, 0.57, 0.8, 0.97])
def test_a_text_begins_with_the_agreement_in_training(agreement):
    """In the mean, as many drafts are right. A good exit is sure more often."""
    passed_EZ, tried_EZ = expected_counts([agreement, 0.5])
    np.testing.assert_allclose(tried_EZ.sum(-1), AGREEMENT_COUNT)
    np.testing.assert_allclose(passed_EZ.sum(-1) / AGREEMENT_COUNT, [agreement, 0.5], atol=2e-3)
    assert (tried_EZ[0, 4] > tried_EZ[1, 4]) == (agreement > 0.5)
    strategy = Adaptive((1, 2), agreement=(agreement, 0.5))
    np.testing.assert_allclose(strategy.first_guess(1).tried_BEZ, [tried_EZ], rtol=1e-6)
    lesson = Counts(passed_EZ[::-1], tried_EZ[::-1])  # of a text, which is the better guess
    np.testing.assert_allclose(strategy.first_guess(1, lesson).tried_BEZ[0], lesson.tried)


@pytest.mark.parametrize(("agreement", "chosen"), [((), 2), ((0.3,), 0)])
def test_drafts_of_a_new_text_are_trusted_as_in_training(model, agreement, chosen):
    """A token takes 10 seconds, and two drafts 20. Unknown drafts promise 1 + 1.17 tokens. Those
    that were right with 0.3 in training promise fewer."""
    strategy = Adaptive((2,), lengths=(0, 2), agreement=agreement)
    options = dict(capacity=64, num_layers=4, dtype=jnp.float32, learned=strategy.first_guess(1))
    state = new_state(model.config, [Request(prompt=(1, 2, 3), max_new_tokens=20)], **options)
    seconds_QJ = jnp.array([[10, math.inf], [math.inf, 20.0]])
    choice = jax.jit(lambda: choose((2,), (0, 2), 4, state, jnp.array([0]), seconds_QJ))()
    assert choice.exit_layer == chosen


def test_rows_stop_drafting_together():
    """Row 0 would stop by itself. Together with row 1 its draft pays, until row 1 has ended."""
    chances_ZT = jnp.array([[0.2, 0.1], *[[0.9, 0.8]] * 4])
    confidence = Together(jnp.array([1.0, 0.8]), chances_ZT, jnp.ones(2))
    sure_B = confidence.chance(jnp.array([[0.1], [0.9]]), jnp.int32(1))
    np.testing.assert_allclose(sure_B, [0.1, 0.8])
    both, at = jnp.array([True, True]), jnp.int32(1)
    assert confidence.go_on(both, sure_B, at).tolist() == [True, True]
    assert not confidence.go_on(both, sure_B, jnp.int32(0)).any()
    assert not confidence.go_on(jnp.array([True, False]), sure_B, at).any()
    ahead = dataclasses.replace(confidence, weight_B=jnp.array([1.2, 0.8]))
    assert not ahead.go_on(both, sure_B, at).any()  # 0.12 + 0.64 < 0.8


def test_rows_that_are_ahead_count_less(model):
    """Row 0 has looked up all its latest drafts, and row 1 none. A lookup promises 6.9 tokens of
    row 0: worth 3 rounds if both rows have as far to go, but not if row 0 is near its end."""
    learned = Learned.create(2, 0)
    counts = jnp.zeros((2, LONGEST)).at[0, -1].set(99)
    learned = dataclasses.replace(learned, lookup_passed_BM=counts, lookup_tried_BM=counts)
    seconds_QJ = jnp.array([[10.0, 30.0]])
    for left, chosen in ((90, 6), (30, 0)):
        requests = [Request(prompt=(1, 2), max_new_tokens=new) for new in (left, 90)]
        options = dict(capacity=128, num_layers=4, dtype=jnp.float32, learned=learned)
        state = new_state(model.config, requests, **options)
        matched_B = jnp.array([LONGEST, 0])
        choice = jax.jit(lambda: choose((), (0, 6), 4, state, matched_B, seconds_QJ))()  # noqa: B023
        assert choice.num_draft_tokens == chosen


def test_tokens_of_lookups_by_hand():
    """Two of ten drafts with eight matching tokens passed, so those with seven pass less often."""
    one = dataclasses.replace(
        Learned.create(1, 1),
        lookup_passed_BM=jnp.zeros((1, LONGEST)).at[0, -1].set(2),
        lookup_tried_BM=jnp.zeros((1, LONGEST)).at[0, -1].set(10),
    )
    *_, seventh, eighth = LOOKUP_CHANCES
    factor = (2 + TEXT_COUNT) / (10 * eighth + TEXT_COUNT)
    seventh, eighth = seventh * factor, eighth * factor
    eighth = (2 + USUAL_COUNT * eighth) / (10 + USUAL_COUNT)
    tokens = one.lookup_tokens(np.array([LONGEST - 1]), (0, 1, 3))[0]
    expected = [1, 1 + seventh, 1 + seventh * (1 + eighth + eighth**2)]
    np.testing.assert_allclose(tokens, expected, rtol=1e-6)
    assert one.lookup_tokens(np.array([0]), (0, 1, 3)).tolist() == [[1, 1, 1]]


def seconds_of(engine, budget):
    """Measured seconds of rounds in the smallest cache."""
    capacity = engine.runtime.capacity(1, engine.strategy)
    return np.array(engine.runtime.arguments(engine.strategy, capacity, budget).seconds_QJ)


@pytest.mark.long
def test_measured_seconds_are_kept(model, tokenizer, tmp_path, monkeypatch):
    """A second engine reads them; a damaged file is measured again; a budget leaves some out."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path))
    asked, shown = Adaptive((1,), lengths=(0, 2)), []

    def track(timings):
        shown.append(len(timings))
        return timings

    def seconds(strategy=asked, budget=measuring.MEASURING):
        return seconds_of(Engine(model, tokenizer, strategy, track=track), budget)

    first = seconds()
    assert np.isfinite(first).all() and (first > 0).all() and len(shown) == 1
    (file,) = (tmp_path / "round_seconds").iterdir()
    file.write_text(json.dumps([(first * 2).tolist(), 0.0]))
    np.testing.assert_allclose(seconds(), first * 2)
    assert len(shown) == 1
    for damaged in ("[", "{}", "[[[1, 2]], 20]"):  # the last one has another shape
        file.write_text(damaged)
        few = seconds(budget=0.0)
        assert np.isfinite(few).sum() == 1 and np.isfinite(few[0, 0])
    assert len(shown) == 4
    np.testing.assert_allclose(seconds(budget=0.0), few)  # more would not be reached now either
    assert len(shown) == 4
    assert np.isfinite(seconds()).all() and len(shown) == 5
    assert len(seconds(dataclasses.replace(asked, exits=()))) == 1 and len(shown) == 6
    assert len(list(file.parent.iterdir())) == 2


@pytest.mark.long
def test_long_drafts_are_timed_too(model, tokenizer, monkeypatch, tmp_path):
    """In the smallest cache, half of the slots have no room for these."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path))
    engine = Engine(model, tokenizer, Adaptive(lengths=(0, 300)))
    assert (seconds_of(engine, measuring.MEASURING) > 0).all()


def test_slow_phases_of_the_machine_do_not_count():
    """One repeat was slow in all choices, one in a single choice, and one was cut off. Only ratios
    decide."""
    true = np.array([[1.0, 2.0, 3.0], [math.inf, 4.0, 5.0]])
    found = np.stack([true, 3 * true, true, true, true])
    found[3, 1, 2] = 9.0
    found[4, 1] = math.inf
    typical, error = measuring.typical(found)
    np.testing.assert_allclose(typical / typical[0, 0], true)
    assert error < 1e-9  # of most repeats
    found[1:, 1, 1] = math.inf  # only the first repeat is whole
    np.testing.assert_allclose(measuring.typical(found)[0], true)


def test_the_error_of_medians_by_hand():
    """Ratios of the second choice to the first: 2 e^-0.2, 2, 2 e^0.2 and 2 e^0.6. Each repeat's
    level is half of that, so logarithms deviate from their median 0.05 by 0.15, 0.05, 0.05, 0.25:
    by 0.1 in the median, of both choices."""
    ratios = 2 * np.exp([-0.2, 0.0, 0.2, 0.6])
    found = np.stack([np.ones(4), ratios], axis=1)[:, None]
    assert measuring.typical(found)[1] == pytest.approx(1.25 * 1.48 * 0.1 / 2)


class Clock:
    """A stopwatch of rounds that take 1 ms, up to a share that swings from call to call."""

    def __init__(self, share: float):
        self.calls, self._share = 0, share

    def run(self, rounds, arguments):
        self.calls += 1
        return 0.001 * rounds * (1 + self._share * (self.calls % 7 - 3)), rounds

    def empty_call(self, arguments):
        return 0.0


@pytest.mark.parametrize("share, repeats", [(0.001, measuring.FEWEST), (0.2, measuring.REPEATS)])
def test_repeats_end_once_they_agree(share, repeats):
    clock = Clock(share)
    seconds_QJ = measuring.measure(clock, AutoArguments(jnp.ones((2, 2)), None), budget=60)
    np.testing.assert_allclose(seconds_QJ, 0.001, rtol=3 * share)
    assert clock.calls == 2 + 4 * repeats


@pytest.mark.long
def test_each_size_of_the_cache_has_its_own_seconds(model, tokenizer, monkeypatch):
    """All are known before the text begins. A small cache makes lookups slow here, a large one
    makes them fast: they begin after the tokens that are made without a choice."""
    large, known = [], []

    def kept_seconds(start, identity, arguments, strategy, budget, track):
        capacity = identity[CAPACITY]
        known.append((capacity, budget, engine.decode_seconds))
        return np.array(only(0, 2 * (capacity > 320))[:1])

    monkeypatch.setattr(runtime, "kept_seconds", kept_seconds)
    engine = Engine(model, tokenizer, Adaptive(lengths=LENGTHS), ignore_end=True)
    for _ in range(2):
        (one,) = engine.generate([[5, 6, 7] * 80], max_new_tokens=140)
        large.append(one.trace)
    assert known == [(320, measuring.MEASURING / 2, 0.0), (576, measuring.MEASURING / 2, 0.0)]
    small = 1 + 320 - 240 - (1 + LENGTHS[-1])  # the first token, and rounds until one lacks slots
    for trace in large:
        drafted = trace.round_n[trace.round_n > 0] - 1
        assert (drafted[:small] == 0).all()
        assert (drafted[small + MOST_IDLE_TOKENS :][:5] > 0).all()


def test_few_sizes_are_timed(model, tokenizer, monkeypatch):
    """Those of the prompts and the next one. Each further one would need a program in advance."""
    monkeypatch.setattr(
        runtime, "kept_seconds", lambda _, identity, *__: np.full((1, 3), identity[CAPACITY])
    )
    strategy = Adaptive(lengths=LENGTHS)
    engine = Engine(model, tokenizer, strategy)
    monkeypatch.setattr(engine.programs, "prepare", lambda *calls: None)  # nothing is decoded here
    requests = [Request(prompt=(5,) * length, max_new_tokens=9000) for length in (5, 600)]
    batch = ContinuousBatch(engine.runtime, strategy, tokenizer, requests)
    found = [batch._arguments.of(320 + 256 * n) for n in (0, 1, 3, 7, 15)]
    timed = [int(one.seconds_QJ[0, 0]) for one in found]
    assert timed == [320, 320, 1088, 2112, 2112]


@pytest.mark.parametrize(
    "strategy, message",
    [
        (Adaptive((4,)), "exit layer 4 is out of range: use --exit-layer 1..3"),
        (Adaptive((0, 1)), "exit layer 0 is out of range: use --exit-layer 1..3"),
        (Adaptive(lengths=(1, 3)), "lengths (1, 3) must ascend from 0"),
        (Adaptive(lengths=(-2, 0)), "lengths (-2, 0) must ascend from 0"),
        (Adaptive(lengths=(0,)), "lengths (0,) must ascend from 0, with at least one draft length"),
        (Adaptive((2, 1)), "exits (2, 1) must ascend"),
        (Adaptive((1,), seconds=((1.0,) * 6,)), "seconds have the shape (1, 6), not (2, 4)"),
        (Adaptive(vocabulary=DraftVocabulary(np.arange(300))), "a draft vocabulary of 300"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, strategy, message):
    with pytest.raises(ConfigError) as error:
        Engine(model, tokenizer, strategy)
    assert message in str(error.value)


def test_pinned_to_one_choice_it_is_the_static_strategy(engine):
    """The same rounds, drafts and accepted drafts as self-speculation with that exit and length."""
    pinned = generate(engine, adaptive(only(2, 1)))
    static = generate(engine, SelfSpeculative(EXITS[1], LENGTHS[1]))
    for one, other in zip(pinned, static, strict=True):
        assert one.drafted_by_position == other.drafted_by_position
        assert one.accepted_by_position == other.accepted_by_position
        assert (one.trace.round_n == other.trace.round_n).all()
