"""Log-probabilities of given tokens, against a plain forward pass over each text."""

from functools import partial

import jax
import numpy as np
import pytest

from lsjax.evaluation import exits
from lsjax.model.llama import stacked
from tests.marks import long

score_texts = partial(exits.score_texts, exit_layer=4)


@pytest.fixture(scope="module")
def texts(config) -> list[tuple]:
    """Rows with one to all tokens scored, on both sides of a bucket's border; one whose first token
    alone is given, and one with nothing to score."""
    rng = np.random.default_rng(0)
    sizes = [(2, 1), (9, 8), (33, 5), (34, 20), (60, 59), (21, 1), (5, 0), (65, 40)]
    return [(rng.integers(0, config.vocab_size, n).tolist(), count) for n, count in sizes]


@pytest.fixture(scope="module")
def log_probs(model):
    """Log-probabilities of what follows each token, at every exit: [L, T, V]."""
    forward = jax.jit(lambda tokens_BT: jax.nn.log_softmax(model.unembed(model.exits(tokens_BT))))

    def of(tokens) -> np.ndarray:
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[:, 0, : len(tokens)]

    return of


def expected(log_probs, text: tuple, exit_layer: int) -> tuple[float, bool]:
    """One token after the other, in a pass over the whole text."""
    of_LTV = log_probs(text[0])[exit_layer - 1]
    scored = range(len(text[0]) - text[1], len(text[0]))
    return (
        float(sum(np.float64(of_LTV[at - 1, text[0][at]]) for at in scored)),
        all(of_LTV[at - 1].argmax() == text[0][at] for at in scored),
    )


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    (found_logs, found_greedy), (logs, greedy) = (zip(*s, strict=True) for s in (found, wanted))
    assert found_greedy == greedy
    np.testing.assert_allclose(found_logs, logs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exit_layer", [2, *long(1, 3, 4)])
def test_every_exit_is_a_plain_pass_through_its_layers(model, texts, log_probs, exit_layer):
    wanted = [expected(log_probs, text, exit_layer) for text in texts]
    assert_same(score_texts(model, texts, exit_layer=exit_layer, batch_size=3), wanted)


def test_greedy_texts_are_greedy_until_one_token_is_another(model, log_probs):
    tokens = [7]
    for _ in range(6):
        tokens.append(int(log_probs(tokens)[-1, -1].argmax()))
    changed = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
    texts = [(tokens, 6), (changed, 6), (changed[:4], 1)]
    assert [is_greedy for _, is_greedy in score_texts(model, texts)] == [True, False, False]


def test_batch_mates_order_and_padding_do_not_matter(model, texts, monkeypatch):
    alone = [score_texts(model, [text], batch_size=3)[0] for text in texts]
    assert_same(score_texts(model, texts[::-1], batch_size=3)[::-1], alone)
    assert_same(score_texts(model, texts[4:]), alone[4:])
    monkeypatch.setattr(exits, "MIN_LENGTH", 64)
    assert_same(score_texts(model, texts, batch_size=3), alone)


def test_stacked_layers(model, texts):
    found = score_texts(stacked(model), texts[2:5], exit_layer=3, batch_size=3)
    assert_same(found, score_texts(model, texts[2:5], exit_layer=3, batch_size=3))


def test_few_programs(model, config):
    """As many as there are powers of two, whatever lengths and counts there are."""
    program = exits._score_rows
    score_texts(model, [([1] * 33, 1), ([1] * 65, 64)], batch_size=3)
    score_texts(model, [([1] * 33, 1)], batch_size=3)
    before = program._cache_size()
    score_texts(model, [([n] * n, c) for n in range(2, 66, 3) for c in {1, n - 1}], batch_size=3)
    assert program._cache_size() == before


def test_progress_is_seen_batch_by_batch(model, texts):
    seen = []

    def track(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    score_texts(model, texts, batch_size=3, track=track)
    assert seen == [0, 3, 6]


def test_nothing_to_score(model):
    assert score_texts(model, []) == []
    assert score_texts(model, [([5], 0)]) == [(0.0, True)]
