"""What a step is given beside its config: optimizer, rates, weights and loss of exits."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsjax.config import ConfigError, EarlyExitConfig, LayerDropoutConfig, StepConfig
from lsjax.training.early_exit import cross_entropy
from lsjax.training.optimizer import unless_skipped
from lsjax.training.recipe import PAPER, Recipe
from lsjax.training.step import init_state, make_train_step

CONFIG = StepConfig(
    num_steps=20,
    seed=2,
    layer_dropout=LayerDropoutConfig(p_max=0.4, distribution="linear"),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, weights="uniform"),
)


def copied(tree):
    """Steps take the memory of their state over."""
    return jax.tree.map(jnp.copy, tree)


def even_rates(config, num_layers, step, num_steps):
    return jnp.full(num_layers, config.p_max)


def even_exits(config, num_layers, step, num_steps):
    """Exits 2 and 4 weigh 1 and 3, the last one 4; only the first does on odd steps."""
    weights = jnp.array([0.0, 1.0, 0.0, 3.0, 4.0])
    return jnp.where((step % 2 == 1) & (weights == 3), 0, weights)


def by_exit(logits, labels, final_logits, exit, step):
    return (exit + 10 * step) * cross_entropy(logits, labels)


@pytest.mark.long
def test_a_step_does_what_it_is_given(wide, packed, evaluate):
    """Step 1 is plain descent on the sum of the losses, each scaled by its exit and step, at other
    rates."""
    rate, weights, t = 0.3, np.array([0, 1, 0, 0, 4]), 1
    given = dict(
        optimizer=optax.sgd(rate),
        drop_rates=even_rates,
        exit_weights=even_exits,
        exit_loss=by_exit,
    )
    state = init_state(CONFIG, copied(wide), given["optimizer"])
    state = dataclasses.replace(state, step=jnp.int32(t))
    state, metrics = make_train_step(CONFIG, **given)(state, packed)
    # The paper's loss with custom weights, which include the factors.
    factors = np.array([exit + 10 * t for exit in range(1, 5)] + [1])
    custom = weights * factors
    dropout = dataclasses.replace(CONFIG.layer_dropout, distribution="uniform")
    early_exit = EarlyExitConfig(
        curriculum="all", weights="custom", custom_weights=tuple(map(float, custom))
    )
    config = dataclasses.replace(CONFIG, layer_dropout=dropout, early_exit=early_exit)
    (loss, sums_L), gradients = evaluate(config, wide, packed, t)
    scale, tokens = custom.sum() / weights.sum(), (packed["labels_BT"] >= 0).sum()
    np.testing.assert_allclose(metrics["loss"], loss * scale, rtol=2e-6)
    expected = np.where(weights > 0, sums_L * factors / tokens, 0)
    np.testing.assert_allclose(metrics["exit_loss_L"], expected, rtol=2e-6)
    assert metrics["enabled_L"].tolist() == [False, True, False, False, True]
    assert "learning_rate" not in metrics
    moved = jax.tree.map(lambda p, g: p - rate * scale * g, wide, gradients)
    for found, wanted in zip(*map(jax.tree.leaves, (state.model, moved)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_skipped_step_keeps_all_but_the_counts_of_schedules():
    """In states inside of others too."""

    def make(learning_rate):
        return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(learning_rate))

    schedule = optax.linear_schedule(1.0, 0.0, 10)
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.inject_hyperparams(make)(learning_rate=schedule),
        make(schedule),
    )
    params = {"a": jnp.ones(3)}
    before = optimizer.init(params)
    _, after = optimizer.update(params, before, params)
    kept = unless_skipped(jnp.bool_(False), after, before)
    adam, injected, (momentum, rate) = kept
    jax.tree.map(np.testing.assert_array_equal, (adam, momentum), (before[0], before[2][0]))
    jax.tree.map(np.testing.assert_array_equal, injected.inner_state, before[1].inner_state)
    assert rate.count == injected.count == 1
    taken = unless_skipped(jnp.bool_(True), after, before)
    jax.tree.map(np.testing.assert_array_equal, taken, after)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["adafactor", "prodigy", "reduce_on_plateau", "multi_steps", "weight_decay_schedule"]
)
def test_optimizers_of_optax(name, small, packed):
    """Their states hold the parameters, want the loss, are of other shapes, or count steps."""
    decay = optax.linear_schedule(0.1, 0.0, 10)
    optimizer = {
        "adafactor": lambda: optax.adafactor(1e-2),
        "prodigy": lambda: optax.contrib.prodigy(1e-1),
        "reduce_on_plateau": lambda: optax.chain(
            optax.sgd(1e-2), optax.contrib.reduce_on_plateau()
        ),
        "multi_steps": lambda: optax.MultiSteps(
            optax.sgd(decay), every_k_schedule=2
        ).gradient_transformation(),
        "weight_decay_schedule": lambda: optax.adamw(1e-2, weight_decay=decay),
    }[name]()
    state, step = (
        init_state(CONFIG, copied(small), optimizer),
        make_train_step(CONFIG, optimizer=optimizer),
    )
    values = []
    for _ in range(4):
        state, metrics = step(state, packed)
        values.append(float(metrics["loss"]))
    assert np.isfinite(values).all() and metrics["skipped"] == 0
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), state.model, small)))
    # A step that is skipped counts for schedules, but not as one of two that are added.
    scale = state.model.norm.scale[...]
    state.model.norm.scale[...] = scale.at[0].set(jnp.nan)
    before = copied(state.opt_state)
    state, metrics = step(state, packed)
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == ()]
    earlier = [leaf for leaf in jax.tree.leaves(before) if leaf.shape == ()]
    advanced = sum(int(a != b) for a, b in zip(counts, earlier, strict=True))
    assert metrics["skipped"] == 1 and advanced == (name == "weight_decay_schedule")


@pytest.mark.long
def test_updates_that_are_not_finite_are_never_applied(small, packed):
    """Updates of finite gradients, by an optimizer that divides by zero at its second step."""
    optimizer = optax.scale_by_schedule(lambda count: 0.1 / (1 - count))
    state = init_state(CONFIG, copied(small), optimizer)
    step = make_train_step(CONFIG, optimizer=optimizer)
    for skipped in (0, 1, 1):
        before = copied(state.model)
        state, metrics = step(state, packed)
        assert np.isfinite(metrics["loss"]) and metrics["skipped"] == skipped
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.model, before)
        assert any(jax.tree.leaves(moved)) == (metrics["skipped_in_a_row"] == 0)


@pytest.mark.long
def test_an_injected_learning_rate_is_a_metric(small, packed):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.25 * (count + 1))
    state = init_state(CONFIG, copied(small), optimizer)
    step = make_train_step(CONFIG, optimizer=optimizer)
    for expected in (0.25, 0.5, 0.75):
        state, metrics = step(state, packed)
        assert metrics["learning_rate"] == expected


@pytest.mark.parametrize(
    "recipe, changes, error",
    [
        (
            Recipe(drop_rates=even_rates),
            dict(layer_dropout=LayerDropoutConfig()),
            "drop_rates has no effect while layer_dropout.p_max is 0",
        ),
        (
            Recipe(exit_loss=by_exit),
            dict(early_exit=EarlyExitConfig()),
            "exit_loss has no effect, as only the last exit is in the loss",
        ),
        (Recipe(exit_weights=lambda *_: np.zeros(5)), {}, "more than 0 for the last exit"),
        (Recipe(optimizer=optax.sgd), {}, "is not an optax.GradientTransformation: call the"),
    ],
)
def test_functions_without_effect_are_refused(recipe, changes, error, small, packed):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match=error):
        recipe.check(config, 5)
    state = init_state(config, small)
    given = vars(recipe) | dict(optimizer=None)
    if recipe.optimizer is None:
        with pytest.raises(ConfigError, match=error):
            make_train_step(config, **given).lower(state, packed)


@pytest.mark.parametrize(
    "functions, error",
    [
        (
            dict(exit_weights=lambda *_: jnp.ones((1, 5))),
            r"exit_weights returned the shape \[1, 5\] for all steps",
        ),
        (
            dict(exit_loss=lambda logits, labels, final: cross_entropy(logits, labels).mean()),
            r"exit_loss returned the shape \[\] for labels of the shape \[4, \d+\]",
        ),
    ],
)
def test_results_of_another_shape_are_refused(functions, error, small, packed):
    with pytest.raises(ConfigError, match=error):
        make_train_step(CONFIG, **functions).lower(init_state(CONFIG, small), packed)


def test_weights_of_ones_own_may_enable_exits_for_a_loss():
    config = dataclasses.replace(CONFIG, early_exit=EarlyExitConfig())
    Recipe(exit_weights=even_exits, exit_loss=by_exit).check(config, 5)


def scaled_loss(factor):
    def own(logits, labels, final_logits):
        return factor * cross_entropy(logits, labels)

    return own


FACTOR = 2.0


def scaled_by_factor(logits, labels, final_logits):
    return FACTOR * cross_entropy(logits, labels)


def test_what_is_given_has_a_name_and_a_hash(monkeypatch):
    assert PAPER.given() == {}
    given = Recipe(exit_loss=by_exit, drop_rates=even_rates).given()
    assert {key: one["name"] for key, one in given.items()} == {
        "drop_rates": "even_rates",
        "exit_loss": "by_exit",
    }
    assert given["drop_rates"]["sha256"] != given["exit_loss"]["sha256"]

    def told(**functions):
        (one,) = Recipe(**functions).given().values()
        return one

    parts = "scale_by_lion, add_decayed_weights, scale"
    assert told(optimizer=optax.lion(1e-3))["name"] == f"chain({parts})"
    # An optimizer's numbers and schedules are in the hash.
    cosine, linear = optax.cosine_decay_schedule(1e-3, 9), optax.linear_schedule(1e-3, 0.0, 9)
    optimizers = [optax.lion(1e-3), optax.lion(2e-3), optax.lion(cosine), optax.lion(linear)]
    optimizers += [optax.lion(1e-3, weight_decay=0.5), optax.sgd(1e-3)]
    found = [told(optimizer=one)["sha256"] for one in optimizers]
    assert len({*found}) == len(found)
    assert told(optimizer=optax.lion(1e-3)) == told(optimizer=optax.lion(1e-3))
    inject = optax.inject_hyperparams(optax.sgd)
    found = [told(optimizer=inject(learning_rate=rate)) for rate in (cosine, linear, 0.1, cosine)]
    assert found[0] == found[3] and len({one["sha256"] for one in found}) == 3
    before = told(exit_loss=scaled_by_factor)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert told(exit_loss=scaled_by_factor) != before
    parts = [dict(a=1e-3, b=1e-4), dict(a=1e-3, b=5e-4)]
    found = [
        told(
            optimizer=optax.partition(
                {key: optax.sgd(rate) for key, rate in rates.items()}, lambda params: params
            )
        )
        for rates in parts
    ]
    assert found[0] != found[1]
    # So are the values that a function encloses, and arguments that are bound.
    assert told(exit_loss=scaled_loss((1, 2, 1))) != told(exit_loss=scaled_loss((1, 2, 2)))
    one, other = told(exit_loss=scaled_loss(1.0)), told(exit_loss=scaled_loss(2.0))
    assert one["name"] == other["name"] == "scaled_loss"
    assert one["sha256"] != other["sha256"] and one == told(exit_loss=scaled_loss(1.0))
