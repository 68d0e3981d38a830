"""Penalties against their definition, step by step, in every strategy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError, Sampling
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Penalties
from lsjax.decoding.strategy import Autoregressive
from tests.marks import long

MARGIN = 1e-4  # where two computations differ in rounding, a tie of this size may fall either way
NEW = 32


def penalised(logits, history, sampling: Sampling) -> np.ndarray:
    """The logits of the next token as the definitions give them, one token at a time."""
    out = np.array(logits, np.float64)
    for token in set(history):
        out[token] *= sampling.repetition_penalty ** (-1 if out[token] > 0 else 1)
    n = sampling.no_repeat_ngram
    seen = {tuple(history[i : i + n]) for i in range(len(history) - n + 1)} if n else set()
    for token in range(len(out)):
        if n and (*history[len(history) - n + 1 :], token) in seen:
            out[token] = -np.inf
    return out if np.isfinite(out).any() else np.array(logits, np.float64)


ROWS = [
    Sampling(no_repeat_ngram=1),
    Sampling(no_repeat_ngram=2),
    Sampling(repetition_penalty=1.5, no_repeat_ngram=3),
    Sampling(repetition_penalty=3.0),
    Sampling(no_repeat_ngram=11),  # the history may have 11 tokens, or fewer
    Sampling(no_repeat_ngram=2**31 - 1),
    Sampling(repetition_penalty=1e30, no_repeat_ngram=4),
    Sampling(),
]


@pytest.mark.parametrize("seed", range(8))
def test_apply_equals_the_definition(seed):
    """Rows with settings of their own, several positions each, of histories over few tokens, where
    much repeats; slots behind a position hold what must not be seen."""
    random, size, slots, steps = np.random.default_rng(seed), 5, 14, 3
    history_BS = random.integers(0, size, (len(ROWS), slots))
    position_BT = random.integers(1, slots - steps, (len(ROWS), 1)) + np.arange(steps)
    logits_BTW = random.normal(0, 2, (len(ROWS), steps, size)).astype(np.float32)
    found = jax.jit(Penalties.apply)(Penalties.create(ROWS), logits_BTW, history_BS, position_BT)
    for row, sampling in enumerate(ROWS):
        for step in range(steps):
            history = history_BS[row, : position_BT[row, step]].tolist()
            expected = penalised(logits_BTW[row, step], history, sampling)
            np.testing.assert_allclose(found[row, step], expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_apply_to_a_draft_vocabulary(seed):
    """What a draft may not say is said of its own tokens; the history holds others too."""
    random, ids = np.random.default_rng(seed), [1, 2, 4]
    history_BS = random.integers(0, 6, (len(ROWS), 12))
    position_BT = random.integers(4, 12, (len(ROWS), 1))
    logits_BTW = random.normal(0, 2, (len(ROWS), 1, len(ids))).astype(np.float32)
    places_V = jnp.array([3, 0, 1, 3, 2, 3])
    apply = partial(Penalties.apply, places_V=places_V)
    found = jax.jit(apply)(Penalties.create(ROWS), logits_BTW, history_BS, position_BT)
    for row, sampling in enumerate(ROWS):
        history = history_BS[row, : position_BT[row, 0]].tolist()
        whole = np.full(6, -np.inf)
        whole[ids] = logits_BTW[row, 0]
        expected = penalised(whole, history, sampling)[ids]
        np.testing.assert_allclose(found[row, 0], expected, rtol=1e-6)


PROMPTS = [[7], [1, 2, 3, 1, 2, 3], [104, 105] * 8, list(range(40, 60))]
TEXTS = [  # each prompt with several penalties
    Request(prompt=prompt, max_new_tokens=NEW, sampling=sampling, log_probs=True)
    for prompt in PROMPTS
    for sampling in (ROWS[1], ROWS[2], ROWS[3], ROWS[5])
]


@pytest.fixture(scope="module")
def single(model, tokenizer):
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def expected(single):
    """What the whole model says, one text at a time."""
    single.use(Autoregressive())
    return single.generate(TEXTS)


def test_each_token_is_the_best_of_the_penalised_logits(model, expected):
    """By the plain forward of the text and the definition."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    changed = 0
    for request, completion in zip(TEXTS, expected, strict=True):
        text = request.prompt + completion.token_ids
        padded = jnp.array([text + [0] * (64 - len(text))])
        logits_TV = np.asarray(forward(model, padded))[0, len(request.prompt) - 1 :]
        for step, token in enumerate(completion.token_ids):
            history = text[: len(request.prompt) + step]
            logits_V = penalised(logits_TV[step], history, request.sampling)
            assert logits_V.max() - logits_V[token] < MARGIN, (request, step)
            changed += logits_TV[step].argmax() != token
    assert changed > 20, "the penalties changed next to nothing"


@pytest.mark.parametrize("batch_size", [4, *long(1)])
def test_all_strategies_give_the_same_text(
    model, tokenizer, single, expected, strategy, batch_size
):
    """Drafts see the drafts before them, and are judged by a verification that does too."""
    engine = single if batch_size == 1 else Engine(model, tokenizer, batch_size=batch_size)
    engine.use(strategy)
    found = engine.generate(TEXTS)
    for request, one, other in zip(TEXTS, expected, found, strict=True):
        assert one.token_ids == other.token_ids, request
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    if strategy.num_draft_tokens:
        assert (
            sum(c.accepted for c in found) > 20
            and sum((c.trace.replaced_n >= 0).sum() for c in found) > 20
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"repetition_penalty": 0.9}, "repetition_penalty 0.9 must be a finite number from 1 to"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf must be"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty nan must be"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram -1 must be a whole number from 0"),
    ],
)
def test_bad_numbers(changes, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**changes)
