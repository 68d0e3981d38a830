"""Acceptance rules that a caller passes in."""

import jax.numpy as jnp
import pytest

from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.draft import Draft, accept_by_ratio, accept_equal
from lsjax.decoding.engine import Engine
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative

PROMPTS, NEW = [[7], [1, 2, 3], list(range(40, 60))], 24


def accept_none(logits_BTV, draft):
    accepted_B = jnp.zeros_like(draft.count_B)
    return draft.followed_by(logits_BTV.argmax(-1), accepted_B), accepted_B


def texts(model, tokenizer, strategy, **options):
    engine = Engine(model, tokenizer, strategy, batch_size=4)
    return engine.generate(PROMPTS, max_new_tokens=NEW, **options)


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return texts(model, tokenizer, Autoregressive())


def test_a_rule_that_accepts_nothing(model, tokenizer, expected):
    found = texts(model, tokenizer, SelfSpeculative(3, 4, accept=accept_none))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert sum(c.drafted for c in found) > sum(c.accepted for c in found) == 0


@pytest.mark.parametrize(
    "rule, sampling",
    [(accept_equal, Sampling()), (accept_by_ratio, Sampling(temperature=1.0, seed=3))],
)
def test_the_defaults(model, tokenizer, rule, sampling):
    default = texts(model, tokenizer, SelfSpeculative(3, 4), sampling=sampling)
    named = texts(model, tokenizer, SelfSpeculative(3, 4, accept=rule), sampling=sampling)
    assert [c.token_ids for c in named] == [c.token_ids for c in default]


def test_columns_of_a_draft_by_hand():
    """Two drafts of a row and one of another; T is one more than the longest draft has."""
    tokens_BT = jnp.array([[5, 6, 0], [7, 0, 0]])
    draft = Draft(None, jnp.zeros((2, 3, 4)), tokens_BT, jnp.array([2, 1]), None, None)
    assert draft.exists_BT.tolist() == [[True, True, False], [True, False, False]]
    for stands, accepted in [
        ([[1, 1, 1], [1, 1, 1]], [2, 1]),
        ([[0, 1, 1], [1, 0, 0]], [0, 1]),
        ([[1, 0, 1], [0, 1, 1]], [1, 0]),
    ]:
        assert draft.leading(jnp.array(stands, bool)).tolist() == accepted
    own_BT = jnp.array([[1, 2, 3], [4, 8, 9]])
    assert draft.followed_by(own_BT, jnp.array([2, 0])).tolist() == [[5, 6, 3], [4, 8, 9]]
    logits_BTV = jnp.arange(2 * 3 * 10).reshape(2, 3, 10)
    assert draft.of_drafts(logits_BTV).tolist() == [[5, 16, 20], [37, 40, 50]]
    assert draft.first(2).tokens_BT.tolist() == [[5, 6], [7, 0]]
