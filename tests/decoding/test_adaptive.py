"""The strategy that chooses its drafts: exact whatever it chooses, and what it learns."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError, LlamaConfig
from lsjax.decoding import calibration
from lsjax.decoding.adaptive import EXIT_COUNT, EXIT_DECAY, LOOKUP_DECAY, Adaptive, Learned
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.lookup import LONGEST
from lsjax.decoding.request import Request
from lsjax.decoding.rounds import Verified
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative

LENGTHS, EXITS = (0, 2, 5), (1, 2, 3)
SAME = ((1.0,) * 3, *[(math.inf, 1.0, 1.0)] * 3)
PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 17, [5] * 9, list(b"a = b; a = b; a")]


def only(source: int, index: int):
    """Seconds that allow one choice."""
    seconds = np.full((4, 3), math.inf)
    seconds[source, index] = 1.0
    return tuple(map(tuple, seconds.tolist()))


def adaptive(seconds=SAME, vocabulary=None):
    return Adaptive(EXITS, vocabulary, lengths=LENGTHS, seconds=seconds)


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


def test_a_model_without_exits_looks_drafts_up(engine, expected):
    """Its text repeats itself: lookups save rounds."""
    found = generate(engine, Adaptive(lengths=LENGTHS, seconds=(SAME[0],)))
    assert [one.token_ids for one in found] == expected
    assert {name for one in found for name in one.sources} <= {"lookup", "none"}
    repeats = generate(engine, Adaptive(lengths=LENGTHS, seconds=(SAME[0],)), max_new_tokens=200)
    assert max(one.tokens_per_round for one in repeats) > 1.5


def test_texts_of_a_seed_repeat(engine):
    """Whatever was decoded before."""
    options = dict(sampling=Sampling(temperature=0.8, seed=4))
    first = generate(engine, adaptive(), **options)
    generate(engine, adaptive())
    again = generate(engine, adaptive(), **options)
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert len({tuple(one.token_ids) for one in first}) == 6


def test_counts_of_sampled_texts_are_finite(engine):
    """Also if filters or a vocabulary give probability 0 to tokens."""
    strategy = adaptive(vocabulary=DraftVocabulary(np.arange(0, 258, 3)))
    options = dict(sampling=Sampling(temperature=1.5, top_k=3, seed=4), max_new_tokens=60)
    generate(engine, strategy, **options)
    learned = dataclasses.asdict(engine.learned[strategy])
    for name, counts in learned.items():
        assert np.isfinite(counts).all(), name
    assert (learned["passed_BE"] <= learned["tried_BE"]).all()


def test_greedy_texts_begin_with_what_was_learned(engine):
    strategy = adaptive()
    generate(engine, strategy, PROMPTS[:1])
    learned = engine.learned[strategy]
    start = Learned.create(1, 3)
    assert learned.rounds_B > 0 and (learned.tried_BE != start.tried_BE).any()
    # Two rows begin with the last text's shares of the exits, and with nothing else of it.
    guess = dataclasses.asdict(strategy.first_guess(2, learned))
    expected = np.repeat(EXIT_COUNT * learned.passed_BE / learned.tried_BE, 2, axis=0)
    np.testing.assert_allclose(guess.pop("passed_BE"), expected, rtol=1e-6)
    same = dataclasses.asdict(strategy.first_guess(2))
    assert all((guess[name] == same[name]).all() for name in guess)
    engine.use_model(engine.model)
    assert engine.learned == {}


def verified(tokens, accepted, scores):
    return Verified(jnp.array(tokens), jnp.array(accepted), jnp.array(scores, jnp.float32))


def test_counts_by_hand():
    """Two rows, three drafts by exit 2 of (1, 2). Row 0: two pass. Row 1: none pass. The lookup was
    right about row 0's first token; row 1 had none."""
    start = Learned.create(2, 2)
    scores = [[[1, 0.5], [0, 0.5], [1, 0.5], [1, 1]], [[0.25, 0], [1, 1], [1, 1], [1, 1]]]
    round_ = verified([[4, 5, 6, 0], [7, 0, 0, 0]], [2, 0], scores)
    own_E, drafted_B = jnp.array([False, True]), jnp.array([3, 3])
    proposal_BT = jnp.array([[4, 9, 6], [7, 0, 0]])
    rest = (own_E, drafted_B, jnp.array(True), jnp.array([7, 0]), proposal_BT)
    after = start.after(round_, *rest)
    g, h = EXIT_DECAY, LOOKUP_DECAY
    # Exit 1 is scored at the three new tokens of row 0 and the one of row 1; exit 2 tried as many.
    np.testing.assert_allclose(
        after.passed_BE, [[2.8 * g**3 + 2, 2.8 * g**3 + 2], [2.8 * g + 0.25, 2.8 * g]], rtol=1e-6
    )
    np.testing.assert_allclose(after.tried_BE, [[4 * g**3 + 3] * 2, [4 * g + 1] * 2], rtol=1e-6)
    # Seven tokens matched, then eight.
    looked, found = np.full((2, 8), 2.0), np.array(start.found_BM)
    looked[0, 6], found[0, 6] = 2 * h + 1, found[0, 6] * h + 1
    looked[0, 7], found[0, 7] = 2 * h + 1, found[0, 7] * h
    np.testing.assert_allclose(after.looked_BM, looked, rtol=1e-6)
    np.testing.assert_allclose(after.found_BM, found, rtol=1e-6)
    unscored = start.after(round_, own_E, drafted_B, jnp.array(False), *rest[3:])
    assert (unscored.tried_BE[:, 0] == 4).all() and (unscored.tried_BE[:, 1] != 4).all()


def test_scores_take_a_hundredth_of_the_bytes():
    """A head as large as 8 of 30 layers, scored at two exits: 100 * 16 / 38 rounds apart."""
    config = LlamaConfig.smollm2_135m()
    assert config.head_params / config.layer_params == pytest.approx(8, abs=0.01)
    assert Adaptive((8, 15)).scored_every(config) == 43
    assert Adaptive((8, 15), DraftVocabulary(np.arange(1024))).scored_every(config) == 4


def test_expected_tokens_by_hand():
    one = Learned.create(1, 1)
    one = dataclasses.replace(one, passed_BE=jnp.array([[3.0]]), tried_BE=jnp.array([[4.0]]))
    tokens = one.exit_tokens(jnp.array([0, 1, 3]))[0, 0]
    np.testing.assert_allclose(tokens, [1, 1.75, 1 + 0.75 + 0.75**2 + 0.75**3], rtol=1e-6)
    half = dataclasses.replace(one, found_BM=one.looked_BM.at[0, LONGEST - 1].mul(0.5))
    tokens = half.lookup_tokens(jnp.array([LONGEST - 1]), (0, 1, 3))[0]
    np.testing.assert_allclose(tokens, [1, 2, 2 + 0.5 + 0.25], rtol=1e-6)
    assert half.lookup_tokens(jnp.array([0]), (0, 1, 3)).tolist() == [[1, 1, 1]]


def test_measured_seconds_are_kept(model, tokenizer, tmp_path, monkeypatch):
    """A second engine reads them; a damaged file is measured again; a budget leaves some out."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path))
    asked = Adaptive((1, 2), lengths=LENGTHS)
    shown = []

    def track(timings):
        shown.append(len(timings))
        return timings

    first = Engine(model, tokenizer, asked, track=track).strategy.seconds
    assert np.isinf(first)[1:, 0].all() and np.isfinite(np.delete(first, 0, axis=1)).all()
    assert (np.array(first) > 0).all() and len(shown) == 1
    (file,) = (tmp_path / "round_seconds").iterdir()
    file.write_text(json.dumps((np.array(first) * 2).tolist()))
    second = Engine(model, tokenizer, asked, track=track).strategy.seconds
    np.testing.assert_allclose(second, np.array(first) * 2)
    assert len(shown) == 1
    file.write_text("[")
    monkeypatch.setattr(calibration, "BUDGET", 0.0)
    third = np.array(Engine(model, tokenizer, asked, track=track).strategy.seconds)
    assert len(shown) == 2 and np.isfinite(third).sum() == 1 and np.isfinite(third[0, 0])
    file.write_text("[[1, 2]]")  # of another shape
    Engine(model, tokenizer, asked, track=track)
    assert len(shown) == 3
    other = Engine(model, tokenizer, dataclasses.replace(asked, exits=(1,)), track=track)
    assert len(shown) == 4 and len(other.strategy.seconds) == 2


@pytest.mark.parametrize(
    "strategy, message",
    [
        (Adaptive((4,)), "exit layer 4 is out of range: use --exit-layer 1..3"),
        (Adaptive((0, 1)), "exit layer 0 is out of range: use --exit-layer 1..3"),
        (Adaptive(lengths=(1, 3)), "lengths (1, 3) must ascend from 0"),
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
