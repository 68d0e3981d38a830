"""Layers computed only for the rows that keep them: against masks on all rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, OptimizerConfig, StepConfig
from lsjax.training import forward, layer_dropout
from lsjax.training.layer_dropout import drop_rates, keep_counted
from lsjax.training.objective import objective
from lsjax.training.step import init_state, make_train_step

CONFIG = StepConfig(
    num_steps=8,
    seed=6,
    layer_dropout=LayerDropoutConfig(p_max=0.8, distribution="linear", skip="gather"),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, e_scale=0.5),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
)


@pytest.fixture(scope="module")
def eight_rows(packed):
    """The rows of `packed` twice; the second time in another order and of other tokens."""
    other = {name: array[::-1] for name, array in packed.items()}
    other["tokens_BT"] = (other["tokens_BT"] + 3) % 23
    return {name: np.concatenate([packed[name], other[name]]) for name in packed}


@pytest.fixture
def as_masks(monkeypatch):
    """A config's masks are those of "gather", but its layers run on all rows."""

    def counted_mask(rates_L, seed, step, rows_B):
        return keep_counted(rates_L, seed, step, rows_B[None])[0][:, 0]

    monkeypatch.setattr(forward, "keep_mask", counted_mask)

    def change(config: StepConfig) -> StepConfig:
        dropout = dataclasses.replace(config.layer_dropout, skip="mask")
        return dataclasses.replace(config, layer_dropout=dropout)

    return change


def changed(config: StepConfig, **dropout) -> StepConfig:
    dropout = dataclasses.replace(config.layer_dropout, **dropout)
    return dataclasses.replace(config, layer_dropout=dropout)


def differentiated(config, model, batch, step):
    rows_B = jnp.arange(len(batch["tokens_BT"]))
    num_labels = (batch["labels_BT"] >= 0).sum()
    return jax.value_and_grad(partial(objective, config), has_aux=True)(
        model, batch, step, rows_B, num_labels
    )


@pytest.mark.parametrize(
    "rows, remat", [(8, "none"), (3, "nothing_saveable"), (1, "dots_with_no_batch_dims_saveable")]
)
def test_loss_and_gradients_are_those_of_the_same_masks(wide, eight_rows, as_masks, rows, remat):
    config = dataclasses.replace(changed(CONFIG, rescale=True), remat=remat)
    batch = {name: array[-rows:] for name, array in eight_rows.items()}
    rates_L = drop_rates(config.layer_dropout, 5, 3, 8)
    _, which_L = keep_counted(rates_L, config.seed, 3, jnp.arange(rows)[None])
    assert len(set(which_L.tolist())) >= min(3, rows + 1) and 0 in which_L
    run = jax.jit(differentiated, static_argnums=0)
    found, expected = run(config, wide, batch, 3), run(as_masks(config), wide, batch, 3)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), found, expected)


def test_steps_with_rising_rates_and_accumulation(wide, eight_rows, as_masks):
    """One program for all rates; each micro-batch draws its own count and rows."""
    config = dataclasses.replace(changed(CONFIG, schedule="exponential"), micro_batches=2)
    states, programs = [], []
    for one in (config, as_masks(config)):
        state, step = init_state(one, jax.tree.map(jnp.copy, wide)), make_train_step(one)
        for at in (0, 3, 7):
            state, _ = step(dataclasses.replace(state, step=jnp.int32(at)), eight_rows)
        states.append(state)
        programs.append(step._cache_size())
    assert programs == [1, 1]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-9), *states)


def mean_gradient(config, model, batch, draws):
    """Mean over draws of the masks, and its standard error; the rates are constant in time."""

    @jax.jit
    def sums(model):
        def add(total, step):
            _, gradient = differentiated(config, model, batch, step)
            gradient = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
            return (total[0] + gradient, total[1] + gradient**2), None

        size = sum(leaf.size for leaf in jax.tree.leaves(model))
        return jax.lax.scan(add, (jnp.zeros(size), jnp.zeros(size)), jnp.arange(draws))[0]

    total, squares = (np.asarray(array, float) for array in sums(model))
    mean = total / draws
    return mean, np.sqrt(np.maximum(squares / draws - mean**2, 0) / draws)


def test_mean_gradient_is_that_of_masks(small, packed, monkeypatch):
    """Of 10,512 numbers the furthest is 2.9 standard errors away; 28 with counts rounded to the
    nearest, which for two rows are 2, 2, 1, 1 and 0 instead of 2, 1.6, 1.2, 0.8 and 0.4."""
    draws = 1_000
    config = dataclasses.replace(CONFIG, num_steps=draws, early_exit=EarlyExitConfig())
    batch = {name: jnp.asarray(array[:2]) for name, array in packed.items()}

    def furthest() -> float:
        found, error = mean_gradient(config, small, batch, draws)
        allowed = np.sqrt(error**2 + expected_error**2) + 1e-9
        return np.abs((found - expected) / allowed).max()

    expected, expected_error = mean_gradient(changed(config, skip="mask"), small, batch, draws)
    assert furthest() < 5
    rule = layer_dropout.stochastic_rounding

    def nearest(means_L, counts, draws_L):
        return rule(means_L, counts, jnp.full_like(draws_L, 0.5))

    monkeypatch.setattr(layer_dropout, "stochastic_rounding", nearest)
    assert furthest() > 10
