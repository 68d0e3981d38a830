"""The step: AdamW against a plain one in numpy, accumulation, steps that are no numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import (
    ConfigError,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    OptimizerConfig,
    StepConfig,
)
from lsjax.model.llama import Llama, unstacked
from lsjax.training.optimizer import decays, learning_rates
from lsjax.training.step import init_state, make_train_step
from tests.marks import long

CONFIG = StepConfig(
    num_steps=20,
    seed=2,
    layer_dropout=LayerDropoutConfig(p_max=0.4, distribution="linear"),
    early_exit=EarlyExitConfig(
        curriculum="rotational", rotation=2, weights="uniform", token_share=0.5
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5),
)


@pytest.fixture(scope="module")
def step_of():
    """The step of a config, compiled once for all tests."""
    return functools.cache(make_train_step)


def copied(tree):
    """Steps take the memory of their state over."""
    return jax.tree.map(jnp.copy, tree)


def test_steps_are_those_of_adamw(wide, packed, evaluate, step_of):
    """Three steps with warm-up, clipping and decay, by the equations of Loshchilov and Hutter."""
    optimizer = CONFIG.optimizer
    state, step = init_state(CONFIG, copied(wide)), step_of(CONFIG)
    programs = step._cache_size()
    params, structure = jax.tree.flatten(wide)
    decayed = jax.tree.leaves(decays(wide))
    assert 0 < sum(decayed) < len(decayed)
    mean = [np.zeros(p.shape) for p in params]
    square = [np.zeros(p.shape) for p in params]
    for t, rate in enumerate([1e-2 / 3, 2e-2 / 3, 1e-2]):
        state, metrics = step(state, packed)
        (loss, _), gradients = evaluate(CONFIG, jax.tree.unflatten(structure, params), packed, t)
        gradients = [np.asarray(g) for g in jax.tree.leaves(gradients)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        assert norm > optimizer.clip_norm
        for i, g in enumerate(gradients):
            g = g * optimizer.clip_norm / norm
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.95 * square[i] + 0.05 * g**2
            update = mean[i] / (1 - 0.9 ** (t + 1))
            update /= np.sqrt(square[i] / (1 - 0.95 ** (t + 1))) + 1e-8
            params[i] = params[i] - rate * (update + 0.1 * decayed[i] * params[i])
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        assert metrics["tokens"] == (packed["labels_BT"] >= 0).sum()
    assert state.step == 3 and step._cache_size() <= programs + 1
    for found, expected in zip(jax.tree.leaves(state.model), params, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_norms_and_biases_do_not_decay(small):
    flat, _ = jax.tree_util.tree_flatten_with_path(decays(small))
    for path, decayed in flat:
        assert decayed == ("norm" not in jax.tree_util.keystr(path))


@pytest.mark.parametrize("parts", [2, *long(4)])
def test_accumulation_is_the_step_of_the_whole_batch(wide, packed, step_of, parts):
    """Rows with 7, 6, 0 and 7 labels."""
    whole = step_of(CONFIG)(init_state(CONFIG, copied(wide)), packed)
    config = dataclasses.replace(CONFIG, micro_batches=parts)
    found = step_of(config)(init_state(config, copied(wide)), packed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), found, whole)


def test_a_step_that_is_no_number_changes_nothing(small, packed, step_of):
    step = step_of(CONFIG)
    state, _ = step(init_state(CONFIG, copied(small)), packed)
    scale = state.model.norm.scale[...]
    for times in (1, 2):
        state.model.norm.scale[...] = scale.at[0].set(jnp.nan)
        before = copied((state.model, state.opt_state))
        state, metrics = step(state, packed)
        assert state.opt_state[3].count == 1 + times  # the schedule goes on
        kept = state.opt_state[:3], before[1][:3]
        jax.tree.map(np.testing.assert_array_equal, (state.model, kept[0]), (before[0], kept[1]))
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == times
        assert state.step == 1 + times
    state.model.norm.scale[...] = scale
    state, metrics = step(state, packed)
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 2 and metrics["skipped_in_a_row"] == 0


@pytest.mark.parametrize("seed, equal", [(CONFIG.seed, True), *long((3, False))])
def test_two_seeds_differ_and_one_repeats(small, packed, step_of, seed, equal):
    def losses(config):
        state, step, found = init_state(config, copied(small)), step_of(config), []
        for _ in range(3):
            state, metrics = step(state, packed)
            found.append(float(metrics["loss"]))
        return found

    assert (losses(CONFIG) == losses(dataclasses.replace(CONFIG, seed=seed))) == equal


def test_a_step_takes_over_the_state_that_it_is_given(small, packed, step_of):
    state = init_state(CONFIG, copied(small))
    step_of(CONFIG)(state, packed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.model, state.opt_state)))


@pytest.mark.long
def test_one_layer_one_step_and_no_labels(packed):
    """A batch without a label has no gradient, but no division by zero either."""
    shape = LlamaConfig.tiny(num_layers=1, vocab_size=23, hidden_size=16, head_dim=4)
    config = StepConfig(
        num_steps=1,
        early_exit=EarlyExitConfig(curriculum="gradual"),
        layer_dropout=LayerDropoutConfig(p_max=0.5, schedule="exponential"),
    )
    step = make_train_step(config)
    model = jax.jit(lambda: Llama(shape, rngs=nnx.Rngs(0)))()
    state, metrics = step(init_state(config, model), packed)
    assert np.isfinite(metrics["loss"]) and metrics["exit_loss_L"].shape == (1,)
    empty = packed | {"labels_BT": np.full_like(packed["labels_BT"], -1)}
    state, metrics = step(state, empty)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0
    assert metrics["skipped"] == 0


def test_separate_layers_are_stacked(small):
    state = init_state(CONFIG, unstacked(small))
    jax.tree.map(np.testing.assert_array_equal, state.model, small)


def test_config_and_model_must_fit(small, packed):
    exits = EarlyExitConfig(curriculum="subset", exits=(7,))
    with pytest.raises(ConfigError, match="early_exit.exits has 7, but the exits are 1..5"):
        init_state(StepConfig(num_steps=1, early_exit=exits), small)
    uneven = dataclasses.replace(CONFIG, micro_batches=3)
    with pytest.raises(ConfigError, match="micro_batches 3 does not divide the batch of 4 rows"):
        make_train_step(uneven)(init_state(uneven, small), packed)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(schedule="constant"), {0: 1, 99: 1}),
        (dict(schedule="constant", warmup_steps=3), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 99: 1}),
        (dict(schedule="linear"), {0: 1, 50: 0.55, 100: 0.1}),
        (dict(schedule="linear", warmup_steps=20, final_share=0.0), {19: 20 / 21, 20: 1, 60: 0.5}),
        # (1 + cos(pi / 3)) / 2 = 0.75 at a third, 0.1 + 0.9 * 0.75 with a floor of 0.1.
        (dict(schedule="cosine", warmup_steps=10), {10: 1, 40: 0.775, 55: 0.55, 100: 0.1}),
        (dict(schedule="cosine", warmup_steps=100), {99: 100 / 101}),
        (dict(schedule="cosine", warmup_steps=199), {0: 1 / 200, 99: 0.5}),  # longer than the run
    ],
)
def test_learning_rates(changes, expected):
    schedule = learning_rates(OptimizerConfig(learning_rate=1.0, **changes), 100)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)
