"""Scores of every exit against a plain computation on whole logits."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from scipy.special import log_softmax

import lsjax
from lsjax.cli.show import exit_table
from lsjax.config import ConfigError, LlamaConfig
from lsjax.evaluation import exits
from lsjax.evaluation.exits import ExitScores, score_exits
from lsjax.sharding import chunk_steps
from tests.marks import long

LENGTHS = ((9, 7), (16,))  # of the documents in each row


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: lsjax.Llama(LlamaConfig.tiny(vocab_size=37), rngs=nnx.Rngs(3)))()


@pytest.fixture(scope="module")
def batch():
    """Two rows of 16 tokens, the first of two documents; some labels are off."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 37, (2, 16)).astype(np.int32)
    labels = np.roll(tokens, -1, 1)
    segments = np.zeros((2, 16), np.int32)
    positions = np.zeros((2, 16), np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            labels[row, start + length - 1] = -1
            start += length
    labels[1, 3:6] = -1
    names = ("tokens_BT", "labels_BT", "segments_BT", "positions_BT")
    return dict(zip(names, (tokens, labels, segments, positions), strict=True))


@jax.jit
def all_logits(model, tokens_T):
    """After every token, at every exit: [L, T, V]."""
    return model.unembed(model.exits(tokens_T[None]))[:, 0]


def plain_scores(model, batch) -> ExitScores:
    """Document by document, all logits at once."""
    losses, agreements = [], []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            start += length
            labels = batch["labels_BT"][row, piece]
            tokens = batch["tokens_BT"][row, piece]
            padded = np.pad(tokens, (0, 16 - length))  # behind all that is seen
            logits_LTV = np.asarray(all_logits(model, padded))[:, :length]
            log_probs = log_softmax(logits_LTV, axis=-1)
            counted = labels >= 0
            at = np.flatnonzero(counted)
            losses.append(-log_probs[:, at, labels[counted]])
            best = logits_LTV.argmax(-1)
            agreements.append((best == best[-1])[:, at])
    loss_LN, agreed_LN = np.concatenate(losses, 1), np.concatenate(agreements, 1)
    return ExitScores(
        tuple(loss_LN.mean(1).tolist()), tuple(agreed_LN.mean(1).tolist()), loss_LN.shape[1]
    )


@pytest.mark.parametrize("chunk_logits", [2 * 37, *long(2 * 37 * 5, 2**23)])
def test_scores_are_those_of_the_documents_one_by_one(model, batch, chunk_logits, monkeypatch):
    monkeypatch.setattr(exits, "CHUNK_LOGITS", chunk_logits)
    jax.clear_caches()
    scores = score_exits(model, [batch])
    expected = plain_scores(model, batch)
    assert scores.tokens == expected.tokens == 9 - 1 + 7 - 1 + 16 - 1 - 3
    np.testing.assert_allclose(scores.loss_E, expected.loss_E, rtol=1e-5)
    np.testing.assert_allclose(scores.agreement_E, expected.agreement_E, rtol=1e-6)
    assert scores.agreement_E[-1] == 1 > scores.agreement_E[0]


def test_stacked_layers_and_batches_in_parts_give_the_same(model, batch):
    whole = score_exits(model, [batch])
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1)]
    parts = score_exits(lsjax.stacked(model), rows)
    np.testing.assert_allclose(parts.loss_E, whole.loss_E, rtol=1e-6)
    np.testing.assert_allclose(parts.agreement_E, whole.agreement_E, rtol=1e-6)


def test_more_devices_score_more_positions_at_a_time():
    """256 rows of a vocabulary of 32,000 are 4 positions on one device, and 64 on 16."""
    assert chunk_steps(256, 4096, 32_000, exits.CHUNK_LOGITS) == 4
    with jax.sharding.use_abstract_mesh(AbstractMesh((4, 4), ("data", "fsdp"))):
        assert chunk_steps(256, 4096, 32_000, exits.CHUNK_LOGITS) == 64
        assert chunk_steps(256, 7, 32_000, exits.CHUNK_LOGITS) == 7


@pytest.mark.parametrize("parts", [2, *long(1)])
def test_scores_in_the_computation_of_a_step(model, batch, parts):
    """In micro-batches the same scores; in bfloat16 close ones, by an embedding in float32."""
    whole = score_exits(model, [batch])
    found = score_exits(lsjax.stacked(model), [batch], micro_batches=parts, attention="xla")
    np.testing.assert_allclose(found.loss_E, whole.loss_E, rtol=1e-6)
    assert found.tokens == whole.tokens
    narrow = score_exits(model, [batch], dtype="bfloat16", micro_batches=parts)
    assert narrow.loss_E != whole.loss_E
    np.testing.assert_allclose(narrow.loss_E, whole.loss_E, rtol=0.02)


def test_a_text_without_labels_is_refused(model, batch):
    with pytest.raises(ConfigError, match="no token is labelled"):
        score_exits(model, [{**batch, "labels_BT": np.full_like(batch["labels_BT"], -1)}])


def test_perplexity_is_exp_of_the_loss():
    assert ExitScores((np.log(20.0), 800.0), (0.5, 1.0), 3).perplexity_E == pytest.approx(
        (20.0, np.inf)
    )


def test_models_of_different_depths_in_one_table():
    """The deeper one's last exit is shown; the other has dashes there."""
    two, four = (ExitScores((2.5,) * n, (0.5,) * n, 8) for n in (2, 4))
    table = exit_table("", {"two": two, "four": four})
    exits, loss, perplexity, agreement, other_loss, *_ = (list(c.cells) for c in table.columns)
    assert exits[-1] == "4" and other_loss[-1] == "2.500"
    assert (loss[-1], perplexity[-1], agreement[-1]) == ("-", "-", "-")
    assert (loss[0], perplexity[0], agreement[0]) == ("2.500", "12.18", "0.500")
