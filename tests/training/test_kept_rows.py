"""Layers computed only for the rows that keep them: against masks on all rows."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, OptimizerConfig, StepConfig
from lsjax.training import forward, kept_rows
from lsjax.training.layer_dropout import drop_rates
from lsjax.training.loss import objective
from lsjax.training.optimizer import adamw
from lsjax.training.recipe import PAPER, Recipe
from lsjax.training.step import init_state, make_train_step
from tests.marks import long

keep_counted = jax.jit(kept_rows.keep_counted)
CONFIG = StepConfig(
    num_steps=8,
    seed=6,
    layer_dropout=LayerDropoutConfig(p_max=0.8, distribution="linear", skip="gather", rescale=True),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, e_scale=0.5),
    optimizer=OptimizerConfig(
        learning_rate=1e-2, warmup_steps=0, schedule="constant", clip_norm=None
    ),
)


@pytest.fixture(scope="module")
def eight_rows(packed):
    """The rows of `packed` twice; the second time in another order and of other tokens."""
    other = {name: array[::-1] for name, array in packed.items()}
    other["tokens_BT"] = (other["tokens_BT"] + 3) % 23
    return {name: np.concatenate([packed[name], other[name]]) for name in packed}


def changed(config: StepConfig, **dropout) -> StepConfig:
    dropout = dataclasses.replace(config.layer_dropout, **dropout)
    return dataclasses.replace(config, layer_dropout=dropout)


def differentiated(config, model, batch, step, recipe=PAPER):
    """(loss, sums_L), gradients."""
    rows_B = jnp.arange(len(batch["tokens_BT"]))
    num_labels = (batch["labels_BT"] >= 0).sum()
    return jax.value_and_grad(partial(objective, config), has_aux=True)(
        model, batch, step, rows_B, num_labels, recipe
    )


@partial(jax.jit, static_argnums=0)
def gathered(config, model, batch, step, nearest=False):
    """nearest: a fault, counts that are rounded to the nearest."""
    rule = kept_rows.stochastic_rounding

    def rounding(means_L, counts, draws_L):
        return rule(means_L, counts, jnp.where(nearest, 0.5, draws_L))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_rows, "stochastic_rounding", rounding)
        return differentiated(config, model, batch, step)


@jax.jit
def masked(model, batch, step, rates_L, keep_LB):
    """All layers on all rows, under these masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "keep_mask", lambda *_: keep_LB)
        config = changed(CONFIG, skip="mask")
        return differentiated(config, model, batch, step, Recipe(drop_rates=lambda *_: rates_L))


def labelled(batch, rows):
    """The same batch, where only these rows count."""
    labels = np.full_like(batch["labels_BT"], -1)
    labels[rows] = batch["labels_BT"][rows]
    return {**batch, "labels_BT": labels}


def assert_close(found, expected, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), found, expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "rows, remat", [(2, "nothing_saveable"), *long((1, "dots_with_no_batch_dims_saveable"))]
)
def test_loss_and_gradients_are_those_of_the_same_masks(wide, eight_rows, rows, remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    rates_L = drop_rates(config.layer_dropout, 5, 3, 8)
    keep_LPR, which_L = keep_counted(rates_L, config.seed, 3, jnp.arange(rows)[None])
    assert len(set(which_L.tolist())) >= min(3, rows + 1) and 0 in which_L
    keep_LB = np.ones((5, 8), bool)
    keep_LB[:, -rows:] = keep_LPR[:, 0]
    batch = {name: array[-rows:] for name, array in eight_rows.items()}
    found = gathered(config, wide, batch, 3)
    assert_close(found, masked(wide, labelled(eight_rows, slice(-rows, None)), 3, rates_L, keep_LB))


@pytest.mark.long
def test_steps_with_rising_rates_and_accumulation(wide, eight_rows, monkeypatch):
    """One program for all rates; each micro-batch draws its own count and rows. Rates are float32,
    and their last bit depends on how they are compiled."""
    monkeypatch.setattr(kept_rows, "COUNTS", 2)  # fewer branches compile sooner
    config = dataclasses.replace(changed(CONFIG, schedule="exponential"), micro_batches=2)
    state, step = init_state(config, jax.tree.map(jnp.copy, wide)), make_train_step(config)
    optimizer = adamw(config.optimizer, config.num_steps)
    model, opt_state, counts = wide, optimizer.init(wide), set()
    update = jax.jit(optimizer.update)
    moved = jax.jit(optax.apply_updates)
    for at in (0, 5, 7):
        rates_L = drop_rates(config.layer_dropout, 5, at, 8)
        parts = [
            keep_counted(rates_L, config.seed, at, jnp.arange(part, 8, 2)[None]) for part in (0, 1)
        ]
        counts.add(tuple(tuple(which_L.tolist()) for _, which_L in parts))
        keep_LB = np.stack([keep_LPR[:, 0] for keep_LPR, _ in parts], axis=2).reshape(5, 8)
        (loss, _), gradients = masked(model, eight_rows, at, rates_L, keep_LB)
        updates, opt_state = update(gradients, opt_state, model)
        model = moved(model, updates)
        state, metrics = step(dataclasses.replace(state, step=jnp.int32(at)), eight_rows)
        assert_close((metrics["loss"], state.model), (loss, model), atol=1e-7)
    assert step._cache_size() == 1
    assert len(counts) == 3 and any(one != other for one, other in counts)


def flat(gradients):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])


@pytest.mark.long
def test_mean_gradient_is_that_of_masks(wide, eight_rows):
    """The furthest number is 2.9 standard errors away; 15 with counts rounded to the
    nearest, which for two rows are 2, 2, 1, 1 and 0 instead of 2, 1.6, 1.2, 0.8 and 0.4."""
    rates_L = drop_rates(CONFIG.layer_dropout, 5, 1, 8)
    expected = 0
    # A row's gradient is its own, so the mean is over the masks of one row, all there are.
    batch = labelled(eight_rows, slice(2))
    for keep_L in itertools.product([True], *[[False, True]] * 4):
        probability = np.where(keep_L, 1 - rates_L, rates_L).astype(float).prod()
        keep_LB = np.tile(np.array(keep_L)[:, None], 8)
        expected += probability * flat(
            masked(wide, batch, 1, jnp.asarray(rates_L, jnp.float32), keep_LB)[1]
        )

    config = dataclasses.replace(CONFIG, remat="nothing_saveable")
    batch = {name: array[:2] for name, array in eight_rows.items()}

    def mean_and_error(nearest, draws=250):
        # The same exits are on in every other step.
        steps = range(1, 1 + 2 * draws, 2)
        drawn = np.stack([flat(gathered(config, wide, batch, at, nearest)[1]) for at in steps])
        return drawn.mean(0), drawn.std(0) / np.sqrt(draws) + 1e-9

    mean, error = mean_and_error(nearest=False)
    assert np.abs((mean - expected) / error).max() < 5
    wrong, _ = mean_and_error(nearest=True)
    assert np.abs((wrong - expected) / error).max() > 12
