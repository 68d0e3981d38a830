"""Every strategy against the exact distribution. Long: 20,480 texts of each, and large programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.draft import DraftVocabulary, accept_block
from lsjax.decoding.sampling import Purpose
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from tests.decoding.test_sampling import (
    assert_another_distribution,
    assert_distribution,
    small_model,
)

VOCABULARY = DraftVocabulary(np.array([0, 2, 3, 5, 8, 9]))
# Of none and lookups, and of two exits: each of these drafts in a part of the texts.
COSTS = ((1.0, 1.05), (np.inf, 1.9), (np.inf, 1.9))


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.mark.parametrize(
    "strategy",
    [
        Autoregressive(),
        SelfSpeculative(2, 2, VOCABULARY, draft_confidence=0.3),
        Adaptive((1, 2), VOCABULARY, lengths=(0, 2), seconds=COSTS),
    ],
    ids=["autoregressive", "vocabulary_and_confidence", "auto"],
)
def test_texts_have_the_models_distribution(small, strategy):
    assert_distribution(small, strategy)


def resample_from_the_target(logits_BTV, draft):
    """Replaces a refused draft by a token from p instead of max(0, p - q)."""
    tokens_BT, accepted_B = accept_block(logits_BTV, draft)
    p_BTV = jnp.exp(draft.state.draws.log_probs(logits_BTV))
    p_BV = jnp.take_along_axis(p_BTV, accepted_B[:, None, None], axis=1)[:, 0]
    token_B = draft.state.draws.token(p_BV, draft.state.length_B + accepted_B, Purpose.TOKEN)
    place_BT = jnp.arange(tokens_BT.shape[1]) == accepted_B[:, None]
    return jnp.where(place_BT, token_B[:, None], tokens_BT), accepted_B


def another_temperature(logits_BTV, draft):
    """The ratio takes other probabilities than those that the draft was drawn from."""
    wrong = jax.nn.log_softmax(draft.log_q_BTN / 2)
    return accept_block(logits_BTV, dataclasses.replace(draft, log_q_BTN=wrong))


@pytest.mark.parametrize("rule", [resample_from_the_target, another_temperature])
def test_a_broken_rule_is_found(small, rule):
    assert_another_distribution(small, rule)
