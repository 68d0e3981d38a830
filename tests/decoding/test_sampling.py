"""Sampling: the filters against a sort, and every strategy against the exact distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare

from lsjax.config import ConfigError, LlamaConfig
from lsjax.data.tokenizer_huggingface import ByteTokenizer
from lsjax.decoding import acceptance, self_speculative
from lsjax.decoding.acceptance import accept_by_ratio
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.loops import decode, prefill
from lsjax.decoding.sampling import Draws, Purpose, Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.model.llama import Llama

V = 12  # a vocabulary so small that every token is drawn often
BATCH, RUNS = 512, 40  # 20,480 texts
PROMPTS = ([3, 1, 4], [7])


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


@pytest.mark.parametrize("size", [2, 50, 1000])
def test_filters_equal_a_sort(size):
    """In one batch, each row with its own; a greedy row and one without filters beside."""
    rows = [*FILTERS, Sampling(), Sampling(temperature=1.0, top_k=10**6), Sampling(top_k=3)]
    logits = jax.random.normal(jax.random.key(size), (len(rows), 3, size)) * 3
    found = np.exp(jax.jit(lambda d, x: d.log_probs(x))(Draws.create(rows), logits))
    for row, sampling in enumerate(rows):
        for step in range(3):
            if sampling.temperature == 0:
                expected = np.eye(size)[logits[row, step].argmax()]
            else:
                expected = by_sorting(logits[row, step], sampling)
            np.testing.assert_allclose(found[row, step], expected, atol=1e-5)


def test_ties_with_the_last_one_stay():
    draws = Draws.create([Sampling(temperature=1.0, top_k=2)])
    log = draws.log_probs(jnp.array([[[5.0, 4.0, 4.0, 1.0]]]))
    assert np.isfinite(log[0, 0]).tolist() == [True, True, True, False]
    equal = draws.log_probs(jnp.zeros((1, 1, 4)))  # of two greedy maxima argmax takes the first
    assert np.isfinite(equal).all()


def test_an_unlikely_token_is_never_drawn_and_streams_are_apart():
    draws = Draws.create([Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 1)])
    log_BV = jnp.log(jnp.array([[0.5, 0.5, 0.0]] * 3))
    tokens = np.array(
        [
            [draws.token(log_BV, jnp.full(3, position), purpose) for position in range(50)]
            for purpose in (Purpose.TOKEN, Purpose.DRAFT)
        ]
    )
    assert (tokens < 2).all()
    assert (tokens[..., 0] == tokens[..., 2]).all()  # the seed decides, not the row
    for one, other in [(tokens[0, :, 0], tokens[0, :, 1]), (tokens[0, :, 0], tokens[1, :, 0])]:
        assert 10 < (one == other).sum() < 40


@pytest.fixture(scope="module")
def small() -> Llama:
    """A model of V tokens whose exits differ from its end, but not in everything."""
    config = LlamaConfig.tiny(vocab_size=V, num_layers=3)
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(5)))()


@functools.cache
def program(strategy_program, strategy, part):
    if part == "prefill":
        return jax.jit(functools.partial(prefill, chunk=8, depth=3))
    return jax.jit(functools.partial(decode, strategy=strategy))


def texts(model, strategy, sampling: Sampling, new: int = 4) -> np.ndarray:
    """[RUNS * BATCH, new] tokens, prompts in turns within a batch: it is ragged."""
    key = (strategy.program, strategy)
    run_prefill, run_decode = (program(*key, part) for part in ("prefill", "decode"))
    arguments, out = strategy.arguments(model), []
    prompts = [PROMPTS[row % 2] for row in range(BATCH)]
    base = DecodeState.create(
        model.config,
        prompts,
        [new] * BATCH,
        [[-1]] * BATCH,
        capacity=24,
        slack=strategy.slack,
        num_layers=3,
        dtype=jnp.float32,
        sampling=[sampling] * BATCH,
    )
    lengths = np.array([len(prompt) for prompt in prompts])
    for run in range(RUNS):
        keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(
            jnp.arange(run * BATCH, (run + 1) * BATCH)
        )
        draws = Draws(**(vars(base.draws) | {"key_B2": keys}))
        start = DecodeState(**(vars(base) | {"draws": draws}))
        state = run_prefill(model, start, np.int32(0))
        while np.asarray(state.running_B).any():
            state = run_decode(model, state, np.int32(99), arguments)
        tokens = np.asarray(state.tokens_BS)
        out.append(np.stack([tokens[np.arange(BATCH), lengths + i] for i in range(new)], 1))
    return np.concatenate(out)


def exact(model, sampling: Sampling, prompt) -> np.ndarray:
    """Probabilities [V, V] of the first two tokens after a prompt, by the plain forward."""
    forward = jax.jit(lambda model, tokens: model(tokens)[:, -1])
    first = by_sorting(forward(model, jnp.array([prompt]))[0], sampling)
    after = forward(model, jnp.array([[*prompt, token] for token in range(V)]))
    return first[:, None] * np.stack([by_sorting(row, sampling) for row in after])


def p_values(model, strategy, sampling: Sampling) -> list[float]:
    """Of the first two tokens together, for each of the two prompts."""
    found, values = texts(model, strategy, sampling), []
    for index, prompt in enumerate(PROMPTS):
        mine = found[index::2]
        seen = np.bincount(mine[:, 0] * V + mine[:, 1], minlength=V * V)
        expected = exact(model, sampling, prompt).ravel() * len(mine)
        assert (seen[expected == 0] == 0).all(), "a token that may not be drawn"
        rare = (expected > 0) & (expected < 5)  # one class together
        seen = np.append(seen[expected >= 5], seen[rare].sum())
        expected = np.append(expected[expected >= 5], expected[rare].sum())
        if expected[-1] < 5:
            seen[-2] += seen[-1]
            expected[-2] += expected[-1]
            seen, expected = seen[:-1], expected[:-1]
        values.append(chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)
    return values


VOCABULARY = DraftVocabulary(np.array([0, 2, 3, 5, 8, 9]))


@pytest.mark.parametrize("sampling", FILTERS, ids=lambda s: str(s).removeprefix("Sampling"))
@pytest.mark.parametrize(
    "strategy",
    [Autoregressive(), SelfSpeculative(1, 2), SelfSpeculative(2, 2, VOCABULARY)],
    ids=["autoregressive", "self_speculative", "draft_vocabulary"],
)
def test_texts_have_the_models_distribution(small, strategy, sampling):
    """Chi-square over 20,480 texts: the first token is the prefill's, the second comes from the
    first round, drafted, accepted or replaced."""
    assert min(p_values(small, strategy, sampling)) > 0.01


def accept_always(logits_BTV, draft, head):
    drafts_BT, _ = accept_by_ratio(logits_BTV, draft, head)
    return jnp.where(draft.exists_BT, draft.tokens_BT, drafts_BT), draft.count_B


def resample_from_the_target(logits_BTV, draft, head):
    """Replaces a refused draft by a token from p instead of max(0, p - q)."""
    tokens_BT, accepted_B = accept_by_ratio(logits_BTV, draft, head)
    log_BTV = draft.state.draws.log_probs(logits_BTV)
    log_BV = jnp.take_along_axis(log_BTV, accepted_B[:, None, None], axis=1)[:, 0]
    token_B = draft.state.draws.token(log_BV, draft.state.length_B + accepted_B, Purpose.TOKEN)
    place_BT = jnp.arange(tokens_BT.shape[1]) == accepted_B[:, None]
    return jnp.where(place_BT, token_B[:, None], tokens_BT), accepted_B


def another_temperature(logits_BTV, draft, head):
    """The ratio takes other probabilities than those that the draft was drawn from."""
    wrong = jax.nn.log_softmax(draft.proposals.log_q_BTN / 2)
    proposals = acceptance.Proposals(draft.proposals.index_BT, wrong)
    return accept_by_ratio(
        logits_BTV, acceptance.Draft(**(vars(draft) | {"proposals": proposals})), head
    )


@pytest.mark.parametrize("rule", [accept_always, resample_from_the_target, another_temperature])
def test_a_broken_rule_is_found(small, monkeypatch, rule):
    monkeypatch.setattr(self_speculative, "accept_by_ratio", rule)
    # A strategy of its own, so that no program of the right rule is used.
    strategy = SelfSpeculative(1, 3 + [accept_always, resample_from_the_target].count(rule))
    program.cache_clear()
    assert min(p_values(small, strategy, FILTERS[0])) < 1e-4
    program.cache_clear()


def test_a_row_is_sampled_alone_as_in_a_batch(model, tokenizer):
    """Greedy rows beside sampled ones, a seed each; two seeds differ, one seed repeats."""
    from lsjax.decoding.engine import Engine

    prompts = [[7], [1, 2, 3], [40, 41], [1, 2, 3]]
    samplings = [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.8, top_k=20, seed=4),
        Sampling(),
        Sampling(temperature=0.8, top_k=20, seed=5),
    ]
    for strategy in (Autoregressive(), SelfSpeculative(2, 3)):
        together = Engine(model, tokenizer, strategy, batch_size=4).generate(
            prompts, max_new_tokens=20, sampling=samplings
        )
        engine = Engine(model, tokenizer, strategy)
        for prompt, sampling, one in zip(prompts, samplings, together, strict=True):
            (alone,) = engine.generate([prompt], max_new_tokens=20, sampling=sampling)
            assert alone.token_ids == one.token_ids
        assert together[1].token_ids != together[3].token_ids
        (greedy,) = engine.generate([prompts[2]], max_new_tokens=20)
        assert greedy.token_ids == together[2].token_ids


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": -1.0}, "temperature -1.0 is not a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature nan is not"),
        ({"temperature": float("inf")}, "temperature inf is not"),
        ({"top_k": -1}, "top_k -1 is below 0"),
        ({"top_p": 0.0}, "top_p 0.0 is not in"),
        ({"top_p": 1.1}, "top_p 1.1 is not in"),
        ({"min_p": -0.1}, "min_p -0.1 is not in"),
        ({"min_p": 1.5}, "min_p 1.5 is not in"),
        ({"seed": -1}, "seed -1 is not in"),
        ({"seed": 2**32}, "seed 4294967296 is not in"),
    ],
)
def test_bad_numbers(changes, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**changes)


def test_the_number_of_samplings_must_fit(model):
    from lsjax.decoding.engine import Engine

    with pytest.raises(ConfigError, match="2 samplings for 1 prompts"):
        Engine(model, ByteTokenizer(add_bos=False)).generate([[1]], sampling=[Sampling()] * 2)
