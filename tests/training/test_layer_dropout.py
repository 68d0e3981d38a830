"""Layer dropout: rates by hand from the paper's equations, and masks that depend on nothing else
than seed, step, layer and row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import LayerDropoutConfig
from lsjax.training.layer_dropout import drop_rates, keep_mask

# p_max = 0.2, T = 1001. By hand: D(l) = 2^(l / (L-1)) - 1, S(t) = 2^(t / (T-1)) - 1. At the middle
# of the run S(500) = sqrt(2) - 1 = 0.41421356; D of layer 8 of 24 is 2^(8/23) - 1 = 0.2726415.
#   (L, t): {layer: (p under constant S, p under the paper's exponential S)}
EXPONENTIAL = {
    (24, 0): {0: (0, 0), 8: (0.0545283, 0), 12: (0.0871370, 0), 23: (0.2, 0)},
    (24, 500): {0: (0, 0), 8: (0.0545283, 0.0225864), 23: (0.2, 0.0828427)},
    (24, 1000): {0: (0, 0), 12: (0.0871370, 0.0871370), 23: (0.2, 0.2)},
    (32, 0): {0: (0, 0), 16: (0.0860226, 0), 31: (0.2, 0)},
    (32, 500): {1: (0.0045223, 0.0018732), 16: (0.0860226, 0.0356317), 31: (0.2, 0.0828427)},
    (32, 1000): {0: (0, 0), 16: (0.0860226, 0.0860226), 31: (0.2, 0.2)},
    (40, 0): {0: (0, 0), 13: (0.0519842, 0), 26: (0.1174802, 0), 39: (0.2, 0)},
    (40, 500): {13: (0.0519842, 0.0215326), 26: (0.1174802, 0.0486619), 39: (0.2, 0.0828427)},
    (40, 1000): {0: (0, 0), 13: (0.0519842, 0.0519842), 39: (0.2, 0.2)},
}


@pytest.mark.parametrize("depth, step", EXPONENTIAL)
def test_rates_of_the_paper(depth, step):
    for schedule, column in (("constant", 0), ("exponential", 1)):
        rates = drop_rates(LayerDropoutConfig(p_max=0.2, schedule=schedule), depth, step, 1001)
        assert rates.shape == (depth,)
        for layer, expected in EXPONENTIAL[depth, step].items():
            np.testing.assert_allclose(rates[layer], expected[column], atol=1e-7)


def test_the_paper_s_mean_rate():
    """Figure 12 sets p_max = 0.2 beside a constant rate of the same mean, 0.0889, at L = 32."""
    rates = drop_rates(LayerDropoutConfig(p_max=0.2), 32, 0, 1)
    np.testing.assert_allclose(rates.mean(), 0.0889, atol=5e-5)


@pytest.mark.parametrize(
    "changes, step, expected",
    [
        (dict(distribution="linear"), 3, [0, 0.2, 0.4, 0.6, 0.8]),
        (dict(distribution="uniform"), 3, [0.8] * 5),
        (dict(distribution="uniform", layers=(1, 4)), 3, [0, 0.8, 0, 0, 0.8]),
        # T = 11: S = 1 - 3/10.
        (dict(distribution="linear", schedule="decreasing"), 3, [0, 0.14, 0.28, 0.42, 0.56]),
        (dict(distribution="linear", schedule="decreasing"), 0, [0, 0.2, 0.4, 0.6, 0.8]),
        (dict(distribution="uniform", schedule="decreasing"), 10, [0] * 5),
        # 1 - exp(-3/2) = 0.77686984; 1 - exp(-300/11) is 1 within rounding.
        (dict(distribution="uniform", schedule="saturating", gamma=0.5), 3, [0.62149587] * 5),
        (dict(distribution="uniform", schedule="saturating"), 3, [0.8] * 5),
        (dict(distribution="uniform", schedule="saturating"), 0, [0] * 5),
    ],
)
def test_rates_of_the_siblings(changes, step, expected):
    rates = drop_rates(LayerDropoutConfig(p_max=0.8, **changes), 5, step, 11)
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-7)


def test_one_layer_and_one_step_give_factor_one():
    for changes in (dict(), dict(distribution="linear"), dict(schedule="exponential")):
        config = LayerDropoutConfig(p_max=0.3, **changes)
        assert drop_rates(config, 1, 0, 1) == np.float32(0.3)
        np.testing.assert_allclose(drop_rates(config, 3, 0, 1)[::2], [0, 0.3], rtol=1e-6)


def test_rates_are_the_same_within_a_compiled_program():
    config = LayerDropoutConfig(p_max=0.2, schedule="exponential")
    rates = jax.jit(lambda step: drop_rates(config, 7, step, 10))(4)
    np.testing.assert_allclose(rates, drop_rates(config, 7, 4, 10), rtol=1e-6)


RATES = jnp.array([0, 0.3, 0.5, 1])


def test_masks_depend_on_seed_step_layer_and_row():
    rows = jnp.arange(64)
    mask = keep_mask(RATES, 5, 7, rows)
    np.testing.assert_array_equal(mask, keep_mask(RATES, 5, 7, rows))
    for other in (keep_mask(RATES, 6, 7, rows), keep_mask(RATES, 5, 8, rows)):
        assert (mask[1:3] != other[1:3]).any(axis=1).all()
    assert (mask[1] != keep_mask(RATES[::-1], 5, 7, rows)[1]).any()  # not of the rates alone
    equal_rates = keep_mask(jnp.full(2, 0.5), 5, 7, rows)
    assert (equal_rates[0] != equal_rates[1]).any()


def test_any_grouping_of_the_rows_has_the_same_masks():
    whole = keep_mask(RATES, 5, 7, jnp.arange(12))
    for rows in (np.arange(12).reshape(3, 4), np.arange(12).reshape(4, 3).T):
        for group in rows:
            np.testing.assert_array_equal(keep_mask(RATES, 5, 7, jnp.array(group)), whole[:, group])


def test_masks_keep_layers_at_their_rates():
    steps = jnp.arange(200)
    masks = jax.vmap(lambda step: keep_mask(RATES, 0, step, jnp.arange(50)))(steps)
    dropped_L = 1 - masks.mean((0, 2))
    assert dropped_L[0] == 0 and dropped_L[3] == 1
    # 10,000 draws: four standard deviations of the mean are 0.02.
    np.testing.assert_allclose(dropped_L, RATES, atol=0.02)
