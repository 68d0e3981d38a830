"""The early-exit loss: weights and curricula by hand from the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError, EarlyExitConfig
from lsjax.training.early_exit import (
    curriculum,
    exit_counts,
    exit_entries,
    exit_weights,
    layer_weights,
    loss_weights,
)


def enabled(config, depth, step, num_steps) -> list[int]:
    """The exits that are on, by their numbers."""
    weights = exit_weights(config, depth, step, num_steps)
    return [int(index) + 1 for index in np.flatnonzero(weights)]


# By hand: e(l) = s l (l+1) / 2 for l < L-1, e(L-1) = (L-1) + s (L-2)(L-1) / 2, l = E - 1. The sum
# over l < L-1 is s (L-2)(L-1)L / 6.
#   (L, e_scale): ({exit: e}, sum of all, weight of the last exit when all are on)
WEIGHTS = {
    # last: 23 + 22*23/2 = 276; the others: 22*23*24/6 = 2024
    (24, 1.0): ({1: 0, 2: 1, 3: 3, 13: 78, 23: 253, 24: 276}, 2300, 276 / 2300),
    # last: 31 + 0.2*465 = 124; the others: 0.2*30*31*32/6 = 992
    (32, 0.2): ({1: 0, 2: 0.2, 17: 27.2, 31: 93, 32: 124}, 1116, 124 / 1116),
    # last: 39 + 0.1*741 = 113.1; the others: 0.1*38*39*40/6 = 988
    (40, 0.1): ({1: 0, 2: 0.1, 21: 21, 39: 74.1, 40: 113.1}, 1101.1, 113.1 / 1101.1),
    (32, 0.0): ({1: 0, 17: 0, 31: 0, 32: 31}, 31, 1.0),
}


@pytest.mark.parametrize("depth, e_scale", WEIGHTS)
def test_weights_of_the_paper(depth, e_scale):
    expected, total, last = WEIGHTS[depth, e_scale]
    config = EarlyExitConfig(curriculum="all", e_scale=e_scale)
    weights = layer_weights(config, depth)
    for exit, weight in expected.items():
        np.testing.assert_allclose(weights[exit - 1], weight, rtol=1e-12)
    np.testing.assert_allclose(weights.sum(), total, rtol=1e-12)
    normalised = loss_weights(config, depth, 0, 1000)
    np.testing.assert_allclose(normalised[-1], last, rtol=1e-6)
    np.testing.assert_allclose(normalised, weights / total, rtol=1e-6)


# R of the paper's experiments. Exit E is on iff (E - 1) mod R = t mod R; exit 1 weighs 0.
ROTATIONAL = [
    (32, 8, 0, [9, 17, 25, 32]),
    (32, 8, 1, [2, 10, 18, 26, 32]),
    (32, 8, 7, [8, 16, 24, 32]),
    (32, 8, 500, [5, 13, 21, 29, 32]),  # 500 = 62 * 8 + 4
    (32, 8, 999, [8, 16, 24, 32]),
    (24, 23, 0, [24]),  # exits 1 and 24: the first weighs 0
    (24, 23, 500, [18, 24]),  # 500 = 21 * 23 + 17
    (24, 23, 999, [11, 24]),  # 999 = 43 * 23 + 10
    (40, 39, 0, [40]),
    (40, 39, 500, [33, 40]),  # 500 = 12 * 39 + 32
    (40, 39, 999, [25, 40]),  # 999 = 25 * 39 + 24
    (24, 16, 500, [5, 21, 24]),  # 500 = 31 * 16 + 4
]


@pytest.mark.parametrize("depth, rotation, step, expected", ROTATIONAL)
def test_rotational_curriculum(depth, rotation, step, expected):
    config = EarlyExitConfig(curriculum="rotational", rotation=rotation, e_scale=0.2)
    assert enabled(config, depth, step, 1000) == expected


# w(t, E): e of the exits that are on (as above), over their sum; T = 1000.
#   (L, curriculum, t): {exit: e}
NORMALISED = {
    # R = 23: exit 18 has e = 17 * 18 / 2 = 153, exit 11 10 * 11 / 2 = 55.
    (24, "rotational", 0): {24: 276},
    (24, "rotational", 500): {18: 153, 24: 276},
    (24, "rotational", 999): {11: 55, 24: 276},
    # R = 8: 0.2 * 8 * 9 / 2 = 7.2, 0.2 * 16 * 17 / 2 = 27.2, and so on.
    (32, "rotational", 0): {9: 7.2, 17: 27.2, 25: 60, 32: 124},
    (32, "rotational", 500): {5: 2, 13: 15.6, 21: 42, 29: 81.2, 32: 124},
    (32, "rotational", 999): {8: 5.6, 16: 24, 24: 55.2, 32: 124},
    # R = 39: 0.1 * 32 * 33 / 2 = 52.8, 0.1 * 24 * 25 / 2 = 30.
    (40, "rotational", 0): {40: 113.1},
    (40, "rotational", 500): {33: 52.8, 40: 113.1},
    (40, "rotational", 999): {25: 30, 40: 113.1},
    (24, "gradual", 0): {24: 276},
    (24, "gradual", 42): {23: 253, 24: 276},  # exit 23 joins at 2 * 1000 / 48 = 41.7, 22 at 62.5
    (32, "gradual", 0): {32: 124},
    (32, "gradual", 32): {31: 93, 32: 124},
    (40, "gradual", 0): {40: 113.1},
    (40, "gradual", 25): {39: 74.1, 40: 113.1},
    # All of them: exit E has s (E - 1) E / 2.
    (24, "gradual", 500): {**{E: (E - 1) * E / 2 for E in range(2, 24)}, 24: 276},
    (24, "gradual", 999): {**{E: (E - 1) * E / 2 for E in range(2, 24)}, 24: 276},
    (32, "gradual", 500): {**{E: 0.1 * (E - 1) * E for E in range(2, 32)}, 32: 124},
    (32, "gradual", 999): {**{E: 0.1 * (E - 1) * E for E in range(2, 32)}, 32: 124},
    (40, "gradual", 500): {**{E: 0.05 * (E - 1) * E for E in range(2, 40)}, 40: 113.1},
    (40, "gradual", 999): {**{E: 0.05 * (E - 1) * E for E in range(2, 40)}, 40: 113.1},
}
SETTINGS = {24: (1.0, 23), 32: (0.2, 8), 40: (0.1, 39)}  # e_scale, R


@pytest.mark.parametrize("depth, curriculum, step", NORMALISED)
def test_normalised_weights(depth, curriculum, step):
    e_scale, rotation = SETTINGS[depth]
    config = EarlyExitConfig(curriculum=curriculum, rotation=rotation, e_scale=e_scale)
    expected = NORMALISED[depth, curriculum, step]
    weights = loss_weights(config, depth, step, 1000)
    for exit in range(1, depth + 1):
        wanted = expected.get(exit, 0) / sum(expected.values())
        np.testing.assert_allclose(weights[exit - 1], wanted, rtol=1e-6)


def test_a_rotation_visits_every_exit_once():
    config = EarlyExitConfig(curriculum="rotational", rotation=8, weights="uniform")
    visits = sum(np.asarray(curriculum(config, 30, step, 999), int) for step in range(40, 48))
    assert visits.tolist() == [1] * 29 + [8]


# Exit E joins at t >= (L - E + 1) T / (2L): exit L - k at (k + 1) T / (2L), all of them at T / 2.
GRADUAL = [
    (24, 4800, 0, []),
    (24, 4800, 199, [24]),  # exit 23 joins at 2 * 4800 / 48 = 200
    (24, 4800, 200, [23, 24]),
    (24, 4800, 1200, list(range(13, 25))),  # 12 * 100
    (24, 4800, 2299, list(range(3, 25))),
    (24, 4800, 2300, list(range(2, 25))),
    (24, 4800, 4799, list(range(2, 25))),  # exit 1 joins at 2400 and weighs 0
    (24, 4800, 2400, list(range(2, 25))),
    (32, 1000, 0, [32]),
    (32, 1000, 31, [32]),  # exit 31 at 2 * 1000 / 64 = 31.25
    (32, 1000, 32, [31, 32]),
    (32, 1000, 250, list(range(17, 33))),  # exit 17: 16 * 1000 / 64 = 250
    (32, 1000, 500, list(range(2, 33))),
    (32, 1000, 999, list(range(2, 33))),
    (40, 1000, 0, [40]),
    (40, 1000, 24, [40]),  # exit 39 at 25
    (40, 1000, 25, [39, 40]),
    (40, 1000, 499, list(range(2, 41))),  # exit 2: 39 * 1000 / 80 = 487.5
    (40, 1000, 500, list(range(2, 41))),
    (40, 1000, 999, list(range(2, 41))),
]


@pytest.mark.parametrize("depth, num_steps, step, expected", GRADUAL)
def test_gradual_curriculum(depth, num_steps, step, expected):
    config = EarlyExitConfig(curriculum="gradual")
    assert enabled(config, depth, step, num_steps) == (expected or [depth])


def test_gradual_includes_the_first_exit_where_it_has_a_weight():
    config = EarlyExitConfig(curriculum="gradual", weights="uniform")
    assert enabled(config, 24, 2399, 4800)[0] == 2
    assert enabled(config, 24, 2400, 4800)[0] == 1


def test_the_other_curricula():
    assert enabled(EarlyExitConfig(), 6, 3, 10) == [6]
    assert enabled(EarlyExitConfig(curriculum="all"), 6, 0, 10) == [2, 3, 4, 5, 6]
    assert enabled(EarlyExitConfig(curriculum="all", weights="uniform"), 3, 0, 10) == [1, 2, 3]
    assert enabled(EarlyExitConfig(curriculum="all", e_scale=0.0), 6, 0, 10) == [6]
    subset = EarlyExitConfig(curriculum="subset", exits=(2, 4), weights="uniform")
    assert enabled(subset, 6, 0, 10) == [2, 4, 6]
    np.testing.assert_allclose(loss_weights(subset, 6, 0, 10), np.array([0, 1, 0, 1, 0, 1]) / 3)
    custom = EarlyExitConfig(curriculum="all", weights="custom", custom_weights=(2.0, 0.0, 6.0))
    np.testing.assert_allclose(loss_weights(custom, 3, 0, 10), [0.25, 0, 0.75])
    assert enabled(custom, 3, 0, 10) == [1, 3]


@pytest.mark.parametrize("curriculum", ["none", "rotational", "gradual", "all"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_weights_sum_to_one_and_the_last_exit_is_on(curriculum, depth):
    config = EarlyExitConfig(curriculum=curriculum, rotation=3, e_scale=0.4)
    weights = jax.jit(jax.vmap(lambda step: loss_weights(config, depth, step, 20)))(np.arange(20))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (weights[:, -1] > 0).all()
    most = (np.asarray(weights)[:, :-1] > 0).sum(1).max()
    assert exit_counts(config, depth, 20).max() == most
    np.testing.assert_allclose(loss_weights(config, depth, 0, 1).sum(), 1, rtol=1e-6)


def test_most_exits_are_those_of_the_fullest_phase_of_the_run():
    config = EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.2)
    assert exit_counts(config, 32, 1000).max() == 4
    assert exit_counts(config, 32, 1).max() == 3  # of 1, 9, 17, 25
    assert exit_counts(EarlyExitConfig(), 32, 1000).max() == 0
    assert exit_counts(EarlyExitConfig(curriculum="gradual"), 32, 1000).max() == 30


def test_weights_of_ones_own_replace_curriculum_and_weights():
    """Two exits in the first half of the run, none in the second."""

    def own(config, num_layers, step, num_steps):
        exits = jnp.arange(1, num_layers + 1)
        on = (exits == num_layers) | ((step < num_steps // 2) & (exits % 2 == 0))
        return jnp.where(on, exits, 0)

    config = EarlyExitConfig()
    found = [loss_weights(config, 5, step, 4, own) for step in (1, 2)]
    np.testing.assert_allclose(found, np.array([[0, 2, 0, 4, 5], [0, 0, 0, 0, 11]]) / 11, rtol=1e-6)
    assert exit_counts(config, 5, 4, own).tolist() == [2, 2, 0, 0]
    traced = jax.jit(
        lambda step: (loss_weights(config, 5, step, 4, own), exit_entries_of(own, step))
    )
    weights, (layers, taken, entry_weights) = traced(1)
    np.testing.assert_allclose(weights, found[0], rtol=1e-6)
    assert layers.tolist() == [1, 3, 4] and taken.all()
    np.testing.assert_allclose(entry_weights, np.array([2, 4, 5]) / 11, rtol=1e-6)


def exit_entries_of(weights, step):
    return exit_entries(EarlyExitConfig(), 5, step, 4, weights)


@pytest.mark.parametrize(
    "weights, error",
    [
        ([1.0, 1.0], r"returned the shape \[2\] for all steps \[T, 1\], instead of \[4, 3\]"),
        ([1.0, -1.0, 1.0], "finite weights from 0, and more than 0 for the last exit"),
        ([1.0, np.inf, 1.0], "finite weights from 0, and more than 0 for the last exit"),
        ([1.0, 1.0, 0.0], "finite weights from 0, and more than 0 for the last exit"),
    ],
)
def test_bad_weights_are_refused(weights, error):
    with pytest.raises(ConfigError, match=error):
        exit_counts(EarlyExitConfig(), 3, 4, lambda *_: np.array(weights))
