"""Sampling: the filters against a sort, and every strategy against the exact distribution."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare

from lsjax.config import ConfigError, LlamaConfig, Sampling
from lsjax.decoding.acceptance import accept_block
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.int8_drafts import Int8Drafts
from lsjax.decoding.programs import decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Purpose, RowSampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.llama import Llama
from lsjax.model.protocol import has_draft_state
from tests.decoding.test_penalties import penalised
from tests.marks import long

V = 12  # a vocabulary so small that every token is drawn often
ROWS, RUNS = 512, 10  # 5,120 texts of each setting for each of the two prompts
PROMPTS = [(3, 1, 4), (7,)]
NEW = 3  # tokens that are looked at together
# Many texts are drawn: some of LLVM's passes, which conftest.py leaves out, are worth their time.
OPTIMISED = {"xla_backend_optimization_level": 1}
log_probs = jax.jit(RowSampling.log_distribution)


def by_sorting(logits, sampling: Sampling) -> np.ndarray:
    """The distribution as the definitions give it, one token at a time."""
    x = np.asarray(logits, np.float64) / sampling.temperature
    order = np.argsort(-x, kind="stable")
    if 0 < sampling.top_k < len(x):
        order = order[: sampling.top_k]
    p = np.exp(x - x.max())
    kept = p[order] / p[order].sum()
    order = order[: 1 + np.searchsorted(np.cumsum(kept), sampling.top_p * (1 - 1e-9))]
    order = order[p[order] >= sampling.min_p * (1 - 1e-9)]
    out = np.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7, top_k=3),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.3, min_p=0.2),
    Sampling(temperature=1.0, top_k=6, top_p=0.9, min_p=0.05),
]
# The other filters are compared with a sort above.
SETTINGS = [
    FILTERS[0],
    FILTERS[-1],
    Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.5, no_repeat_ngram=2),
]


@pytest.mark.parametrize("size", [2, 50, 1000])
def test_filters_equal_a_sort(size):
    """In one batch, each row with its own; a greedy row and one without filters beside."""
    rows = [*FILTERS, Sampling(), Sampling(temperature=1.0, top_k=10**6), Sampling(top_k=3)]
    logits = jax.random.normal(jax.random.key(size), (len(rows), 3, size)) * 3
    found = np.exp(log_probs(RowSampling.create(rows), logits))
    for row, sampling in enumerate(rows):
        for step in range(3):
            if sampling.temperature == 0:
                expected = np.eye(size)[logits[row, step].argmax()]
            else:
                expected = by_sorting(logits[row, step], sampling)
            np.testing.assert_allclose(found[row, step], expected, atol=1e-5)


def test_ties_with_the_last_one_stay():
    draws = RowSampling.create([Sampling(temperature=1.0, top_k=2)])
    log = log_probs(draws, np.array([[[5.0, 4.0, 4.0, 1.0]]], np.float32))
    assert np.isfinite(log[0, 0]).tolist() == [True, True, True, False]
    # Of two greedy maxima argmax takes the first.
    equal = log_probs(draws, np.zeros((1, 1, 4), np.float32))
    assert np.isfinite(equal).all()


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_numbers_below_float32(name):
    """They do what the smallest numbers do that float32 has."""
    logits = jax.random.normal(jax.random.key(0), (1, 1, 50)) * 3
    rows = [Sampling(**{"temperature": 1.0, name: value}) for value in (1e-60, 1e-37)]
    draws = RowSampling.create(rows)
    found, expected = np.exp(log_probs(draws, np.tile(logits, (2, 1, 1))))
    assert expected.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_largest_numbers():
    """All tokens, each as probable as the others."""
    draws = RowSampling.create([Sampling(temperature=1e30, top_k=2**31 - 1)])
    logits = jax.random.normal(jax.random.key(0), (1, 1, 50)) * 3
    np.testing.assert_allclose(np.exp(log_probs(draws, logits)), 1 / 50, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_keys_are_those_of_jax(seed):
    """All 32 bits of a seed count."""
    rows = RowSampling.create([Sampling(temperature=1.0, seed=seed)])
    expected = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    np.testing.assert_array_equal(rows.key_B2, expected[None])


def test_an_unlikely_token_is_never_drawn_and_streams_are_apart():
    rows = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 1)] * 50
    draws, position_B = RowSampling.create(rows), jnp.arange(50).repeat(3)
    weight_BV = jnp.tile(jnp.array([0.7, 0.7, 0.0]), (150, 1))  # a sum of 1 is not asked for
    token = jax.jit(draws.token, static_argnums=2)
    first, draft = (
        np.array(token(weight_BV, position_B, purpose)).reshape(50, 3)
        for purpose in (Purpose.TOKEN, Purpose.DRAFT)
    )
    assert (first < 2).all() and (draft < 2).all()
    assert (first[:, 0] == first[:, 2]).all()  # the seed decides, not the row
    for one, other in [(first[:, 0], first[:, 1]), (first[:, 0], draft[:, 0])]:
        assert 10 < (one == other).sum() < 40


@pytest.fixture(scope="module")
def small() -> Llama:
    """A model of V tokens whose exits differ from its end, but not in everything."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1)
    config = LlamaConfig.tiny(vocab_size=V, num_layers=3, init_std=0.5, **sizes)
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(5)))()


run_prefill = jax.jit(
    partial(prefill, chunk=4, depth=3), static_argnames="exits", compiler_options=OPTIMISED
)
forward = jax.jit(lambda model, tokens: model(tokens)[:, -1])


def texts(model, strategy, settings=SETTINGS) -> np.ndarray:
    """[settings, prompts, texts, NEW] tokens: the prefill's and those of two rounds. All settings
    and both prompts are rows of one ragged batch, each row with a seed of its own. `auto` chooses
    for all rows of a batch together, so there each row is a batch."""
    requests = [
        Request(prompt=prompt, max_new_tokens=7, sampling=sampling)  # two rounds do not end before
        for sampling in settings
        for prompt in PROMPTS
    ]
    base = DecodeState.create(
        requests,
        cache=model.new_cache(len(requests), 16, model.num_layers),
        capacity=16,
        learned=strategy.first_guess(len(requests)),
    )
    pairs = np.arange(2 * len(settings)).reshape(-1, 1, 2).repeat(ROWS, axis=1)
    base = jax.tree.map(lambda leaf: np.asarray(leaf)[pairs.ravel()], base)
    loop = partial(decode, strategy=strategy)
    if isinstance(strategy, Adaptive):
        alone = jax.vmap(loop, in_axes=(None, 0, None, None))

        def loop(model, state, rounds, arguments):
            done = alone(model, jax.tree.map(lambda leaf: leaf[:, None], state), rounds, arguments)
            return jax.tree.map(lambda leaf: leaf[:, 0], done)

    run_decode = jax.jit(loop, compiler_options=OPTIMISED)
    arguments = strategy.arguments(model)
    read = partial(run_prefill, exits=strategy.exits if has_draft_state(model) else ())
    make_keys = jax.jit(jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed))))
    rows, out = np.arange(pairs.size), []
    places = np.asarray(base.length_B)[:, None] + np.arange(NEW)
    for run in range(RUNS):
        draws = dataclasses.replace(base.sampling, key_B2=make_keys(run * rows.size + rows))
        state = read(model, dataclasses.replace(base, sampling=draws), np.int32(0))
        state = run_decode(model, state, np.int32(2), arguments)
        out.append(np.take_along_axis(np.asarray(state.tokens_BS), places, axis=1))
    found = np.stack(out).reshape(RUNS, len(settings), ROWS, 2, NEW).transpose(1, 3, 0, 2, 4)
    return found.reshape(len(settings), 2, RUNS * ROWS, NEW)


@cache
def exact(model, sampling: Sampling, prompt) -> np.ndarray:
    """Probabilities [V, V, V] of the first three tokens after a prompt, by the plain forward."""
    joint = np.ones(())
    for count in range(NEW):
        texts = [[*prompt, *said] for said in np.ndindex((V,) * count)]
        logits = np.asarray(forward(model, jnp.array(texts)))
        changed = [penalised(x, text, sampling) for x, text in zip(logits, texts, strict=True)]
        joint = joint[..., None] * np.reshape(
            [by_sorting(x, sampling) for x in changed], (V,) * (count + 1)
        )
    return joint


def p_value(model, sampling: Sampling, prompt, found) -> float:
    """Chi-squared test of the first tokens together."""
    seen = np.bincount(np.ravel_multi_index(found.T, (V,) * NEW), minlength=V**NEW)
    expected = exact(model, sampling, prompt).ravel() * len(found)
    assert (seen[expected == 0] == 0).all(), "a token that may not be drawn"
    order = np.argsort(expected)
    order = order[expected[order] > 0]
    rare = 1 + max((expected[order] < 5).sum(), np.searchsorted(expected[order].cumsum(), 5))
    seen, expected = (  # what is rare is one class together
        np.append(counts[order[:rare]].sum(), counts[order[rare:]]) for counts in (seen, expected)
    )
    return chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


VOCABULARY = DraftVocabulary(np.array([0, 2, 3, 5, 8, 9]))
# Of none and lookups, and of two exits: each of these drafts in a part of the texts.
COSTS = ((1.0, 1.05), (np.inf, 1.9), (np.inf, 1.9))
LOOKUPS = ((1.0, 0.8),)


@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(1, 2),
        *long(
            Adaptive(lengths=(0, 2), seconds=LOOKUPS),
            Autoregressive(),
            SelfSpeculative(2, 2, VOCABULARY, draft_confidence=0.3),
            Adaptive((1, 2), VOCABULARY, lengths=(0, 2), seconds=COSTS),
            Int8Drafts(1, 2),
            SelfSpeculative(1, 2, DraftVocabulary.every(V)),
        ),
    ],
    ids=[
        *("self_speculative", "lookup", "autoregressive", "vocabulary_and_confidence", "auto"),
        *("int8_drafts", "int8_head"),
    ],
)
def test_texts_have_the_models_distribution(small, strategy):
    """Chi-square over 10,240 texts of each setting: the first token is the prefill's, the others
    come from two rounds, drafted, accepted or replaced."""
    found = texts(small, strategy)
    for sampling, of_prompts in zip(SETTINGS, found, strict=True):
        values = [p_value(small, sampling, *pair) for pair in zip(PROMPTS, of_prompts, strict=True)]
        assert min(values) > 0.01, sampling


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy",
    [SelfSpeculative(1, 2), Adaptive((1, 2), lengths=(0, 2), seconds=COSTS)],
    ids=["self_speculative", "auto"],
)
def test_exit_blocks_leave_the_distribution_as_it_is(small, strategy):
    """As above, with drafts of random blocks."""
    model = with_exit_blocks(small, (1, 2))
    model.exit_blocks = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        model.exit_blocks,
    )
    found = texts(model, strategy, FILTERS)
    for sampling, of_prompts in zip(FILTERS, found, strict=True):
        values = [p_value(small, sampling, *pair) for pair in zip(PROMPTS, of_prompts, strict=True)]
        assert min(values) > 0.01, sampling


def accept_always(logits_BTV, draft):
    drafts_BT, _ = accept_block(logits_BTV, draft)
    return jnp.where(draft.exists_BT, draft.tokens_BT, drafts_BT), draft.count_B


def resample_from_the_target(logits_BTV, draft):
    """Replaces a refused draft by a token from p instead of max(0, p - q)."""
    tokens_BT, accepted_B = accept_block(logits_BTV, draft)
    p_BTV = jnp.exp(draft.state.sampling.log_distribution(logits_BTV))
    p_BV = jnp.take_along_axis(p_BTV, accepted_B[:, None, None], axis=1)[:, 0]
    token_B = draft.state.sampling.token(p_BV, draft.state.length_B + accepted_B, Purpose.TOKEN)
    place_BT = jnp.arange(tokens_BT.shape[1]) == accepted_B[:, None]
    return jnp.where(place_BT, token_B[:, None], tokens_BT), accepted_B


def another_temperature(logits_BTV, draft):
    """The ratio takes other probabilities than those that the draft was drawn from."""
    wrong = jax.nn.log_softmax(draft.log_q_BTW / 2)
    return accept_block(logits_BTV, dataclasses.replace(draft, log_q_BTW=wrong))


@pytest.mark.long
@pytest.mark.parametrize("rule", [accept_always, resample_from_the_target, another_temperature])
def test_a_broken_rule_is_found(small, rule):
    (found,) = texts(small, SelfSpeculative(1, 2, accept=rule), FILTERS[:1])
    values = [p_value(small, FILTERS[0], *pair) for pair in zip(PROMPTS, found, strict=True)]
    assert max(values) < 1e-4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": -1.0}, "temperature -1.0 must be a finite number from 0 to 1e"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"temperature": float("inf")}, "temperature inf must be"),
        ({"temperature": 1e31}, "temperature 1e.31 must be"),
        ({"top_k": -1}, "top_k -1 must be a whole number from 0 to 2147483647"),
        ({"top_k": 2**31}, "top_k 2147483648 must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be a finite number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1 must be a finite number above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p -0.1 must be a finite number from 0 to 1"),
        ({"min_p": 1.5}, "min_p 1.5 must be a finite number from 0 to 1"),
        ({"seed": -1}, "seed -1 must be a whole number from 0"),
        ({"seed": 2**32}, "seed 4294967296 must be a whole number from 0"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number from 0"),
    ],
)
def test_bad_numbers(changes, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**changes)
