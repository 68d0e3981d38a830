"""Log-probabilities of given tokens, against a plain forward pass over each window."""

import jax
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.evaluation import scoring
from lsjax.evaluation.scoring import Score, Text, score, shared_rows, windows
from lsjax.model.llama import stacked


@pytest.fixture(scope="module")
def texts(config) -> list[Text]:
    """Of one to all tokens scored, on both sides of a bucket's border, a row of which only the
    first token is given, and one with nothing to score."""
    rng = np.random.default_rng(0)
    sizes = [(2, 1), (9, 8), (33, 5), (34, 20), (60, 59), (21, 1), (5, 0), (65, 40)]
    return [Text(rng.integers(0, config.vocab_size, n).tolist(), count) for n, count in sizes]


@pytest.fixture(scope="module")
def log_probs(model):
    """Log-probabilities of what follows each token, at every exit: [L, T, V]."""
    forward = jax.jit(lambda tokens_BT: jax.nn.log_softmax(model.unembed(model.exits(tokens_BT))))

    def of(tokens) -> np.ndarray:
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[:, 0, : len(tokens)]

    return of


def expected(log_probs, text: Text, exit_layer: int) -> Score:
    """One token after the other, in a pass over the whole text."""
    of_LTV = log_probs(text.tokens)[exit_layer - 1]
    scored = range(len(text.tokens) - text.count, len(text.tokens))
    return Score(
        float(sum(np.float64(of_LTV[at - 1, text.tokens[at]]) for at in scored)),
        all(of_LTV[at - 1].argmax() == text.tokens[at] for at in scored),
        text.count,
    )


def assert_same(found: list[Score], wanted: list[Score]) -> None:
    assert [(s.is_greedy, s.num_tokens) for s in found] == [
        (s.is_greedy, s.num_tokens) for s in wanted
    ]
    np.testing.assert_allclose(
        [s.log_prob for s in found], [s.log_prob for s in wanted], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_every_exit_is_a_plain_pass_through_its_layers(model, texts, log_probs, exit_layer):
    wanted = [expected(log_probs, text, exit_layer) for text in texts]
    assert_same(score(model, texts, exit_layer=exit_layer, batch_size=3), wanted)


def test_the_whole_model_by_default(model, texts):
    assert score(model, texts, batch_size=3) == score(model, texts, batch_size=3, exit_layer=4)


def test_greedy_texts_are_greedy_until_one_token_is_another(model, log_probs):
    tokens = [7]
    for _ in range(6):
        tokens.append(int(log_probs(tokens)[-1, -1].argmax()))
    changed = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
    texts = [Text(tokens, 6), Text(changed, 6), Text(changed[:4], 1)]
    assert [s.is_greedy for s in score(model, texts)] == [True, False, False]


def test_batch_mates_order_and_padding_do_not_matter(model, texts, monkeypatch):
    alone = [score(model, [text], batch_size=3)[0] for text in texts]
    assert_same(score(model, texts[::-1], batch_size=3)[::-1], alone)
    assert_same(score(model, texts[4:]), alone[4:])
    monkeypatch.setattr(scoring, "MIN_LENGTH", 64)
    assert_same(score(model, texts, batch_size=3), alone)


def test_stacked_layers(model, texts):
    found = score(stacked(model), texts[2:5], exit_layer=3, batch_size=3)
    assert_same(found, score(model, texts[2:5], exit_layer=3, batch_size=3))


def test_few_programs(model, config):
    """As many as there are powers of two, whatever lengths and counts there are."""
    program = scoring._score_places
    score(model, [Text([1] * 33, 1), Text([1] * 65, 64)], batch_size=3)
    score(model, [Text([1] * 33, 1)], batch_size=3)
    before = program._cache_size()
    score(model, [Text([n] * n, c) for n in range(2, 66, 3) for c in {1, n - 1}], batch_size=3)
    assert program._cache_size() == before


def test_what_begins_another_shares_its_row():
    texts = [
        Text([5, 6, 1], 1),
        Text([5, 6, 2], 1),
        Text([5, 6, 3, 4], 2),
        Text([5, 7, 1], 2),
        Text([5, 6, 2, 2], 1),
        Text([5, 1], 1),
    ]
    rows = shared_rows(list(enumerate(texts)))
    found = {tuple(row.inputs): sorted(index for index, _ in row.pieces) for row in rows}
    assert found == {(5, 6, 3): [2], (5, 6, 2): [0, 1, 4, 5], (5, 7): [3]}
    # A row of 32 inputs has room for 32 scored tokens.
    rows = shared_rows([(n, Text([5, n], 1)) for n in range(40)])
    assert [(list(row.inputs), row.count) for row in rows] == [([5], 32), ([5], 8)]


def test_answers_to_one_question_share_a_pass(model, log_probs):
    """Of one token, of several, and more of them than a row has room for."""
    question = [9, 8, 7, 6]
    texts = [Text([*question, n], 1) for n in range(70)]
    texts += [Text([*question, n, n + 1, n], 3) for n in range(3)] + [Text(question, 2)]
    of_TV = log_probs(question)[-1]
    found = score(model, texts, batch_size=3)
    np.testing.assert_allclose([one.log_prob for one in found[:70]], of_TV[-1, :70], rtol=1e-5)
    assert [one.is_greedy for one in found[:70]] == [n == of_TV[-1].argmax() for n in range(70)]
    assert_same(found[70:], [expected(log_probs, text, 4) for text in texts[70:]])


def test_windows_by_hand():
    """The example of the module: 10 tokens after c (99), 4 inputs at a time."""
    assert list(windows(Text([99, *range(10)], 10), 4)) == [
        Text([99, 0, 1, 2, 3], 4),
        Text([3, 4, 5, 6, 7], 4),
        Text([5, 6, 7, 8, 9], 2),
    ]
    # What fits is one window, and a long context loses its beginning.
    assert list(windows(Text([1, 2, 3], 2), 4)) == [Text([1, 2, 3], 2)]
    assert list(windows(Text(list(range(20)), 2), 4)) == [Text([15, 16, 17, 18, 19], 2)]
    assert list(windows(Text([1, 2], 0), 4)) == []


def test_a_long_text_is_the_sum_of_its_windows(model, log_probs):
    rng = np.random.default_rng(1)
    text = Text(rng.integers(0, 256, 100).tolist(), 99)
    parts = [
        Text(text.tokens[0:41], 40),
        Text(text.tokens[40:81], 40),
        Text(text.tokens[59:100], 19),
    ]
    wanted = sum(expected(log_probs, part, 2).log_prob for part in parts)
    (found,) = score(model, [text], exit_layer=2, max_length=40, batch_size=3)
    assert found.log_prob == pytest.approx(wanted, rel=1e-5) and found.num_tokens == 99
    # Windows change the number: less context.
    assert abs(expected(log_probs, text, 2).log_prob - found.log_prob) > 1e-2


def test_progress_is_seen_batch_by_batch(model, texts):
    seen = []

    def track(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    score(model, texts, batch_size=3, track=track)
    assert len(seen) == 3  # seven texts with something to score


def test_nothing_to_score(model):
    assert score(model, []) == []
    assert score(model, [Text([5], 0)]) == [Score(0.0, True, 0)]


@pytest.mark.parametrize(
    "texts, options, words",
    [
        ([Text([1, 2], 1)], dict(exit_layer=0), "exit layer 0 is not in 1..4"),
        ([Text([1, 2], 1)], dict(exit_layer=5), "exit layer 5 is not in 1..4"),
        ([Text([1, 2], 1)], dict(max_length=513), "max length 513 is not in 1..512"),
        ([Text([1, 2], 1)], dict(batch_size=0), "batch size 0 is below 1"),
        ([Text([1, 2], 1), Text([1, 2], 2)], {}, "text 1 of 2 tokens can't have 2 scored"),
        ([Text([], 0)], {}, "text 0 of 0 tokens can't have 0 scored"),
        ([Text([1, 258], 1)], {}, "token ids 1..258: give ids in 0..257"),
        ([Text([-1, 2], 1)], {}, "token ids -1..2"),
    ],
)
def test_bad_input(model, texts, options, words):
    with pytest.raises(ConfigError, match=words):
        score(model, texts, **options)
