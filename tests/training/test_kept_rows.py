"""Layers computed only for the rows that keep them: against masks on all rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, StepConfig
from lsjax.training import forward
from lsjax.training.layer_dropout import drop_rates, keep_counted
from lsjax.training.objective import objective

DROPOUT = LayerDropoutConfig(p_max=0.8, distribution="linear", skip="gather")
CONFIG = StepConfig(
    num_steps=8,
    seed=6,
    layer_dropout=DROPOUT,
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, e_scale=0.5),
)


@pytest.fixture(scope="module")
def eight_rows(packed):
    """The rows of `packed` twice; the second time in another order and of other tokens."""
    other = {name: array[::-1] for name, array in packed.items()}
    other["tokens_BT"] = (other["tokens_BT"] + 3) % 23
    return {name: np.concatenate([packed[name], other[name]]) for name in packed}


def evaluate(config, model, batch, step):
    rows_B = jnp.arange(len(batch["tokens_BT"]))
    num_labels = (batch["labels_BT"] >= 0).sum()
    differentiated = jax.value_and_grad(partial(objective, config), has_aux=True)
    return jax.jit(differentiated)(model, batch, step, rows_B, num_labels)


@pytest.mark.parametrize(
    "remat, rescale",
    [("none", False), ("nothing_saveable", True), ("dots_with_no_batch_dims_saveable", False)],
)
def test_loss_and_gradients_are_those_of_the_same_masks(
    wide, eight_rows, monkeypatch, remat, rescale
):
    dropout = dataclasses.replace(DROPOUT, rescale=rescale)
    config = dataclasses.replace(CONFIG, remat=remat, layer_dropout=dropout)
    rates_L = drop_rates(dropout, 5, 3, 8)
    keep_LSR, count_L = keep_counted(rates_L, config.seed, 3, jnp.arange(8)[None])
    assert len(set(np.asarray(count_L).tolist())) >= 3 and 0 in count_L
    found = evaluate(config, wide, eight_rows, 3)
    monkeypatch.setattr(forward, "keep_mask", lambda *_: keep_LSR[:, 0])
    masked = dataclasses.replace(config, layer_dropout=dataclasses.replace(dropout, skip="mask"))
    expected = evaluate(masked, wide, eight_rows, 3)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), found, expected)
