"""Layer dropout: rates by hand from the paper's equations, and masks that depend on nothing else
than seed, step, layer and row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import LayerDropoutConfig
from lsjax.training import kept_rows, layer_dropout
from lsjax.training.kept_rows import row_counts
from lsjax.training.layer_dropout import drop_rates

# A program for each shape, not for each operation.
keep_mask, keep_counted = jax.jit(layer_dropout.keep_mask), jax.jit(kept_rows.keep_counted)

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


def test_counts_are_even_parts():
    assert row_counts(16) == (0, 4, 8, 12, 16)
    assert row_counts(6) == (0, 1, 3, 4, 6)
    assert row_counts(3) == (0, 1, 2, 3)
    assert row_counts(1) == (0, 1)


COUNTED_RATES = jnp.array([0, 0.3, 0.5, 0.9, 1])


@pytest.fixture(scope="module")
def counted():
    """Masks of 4,000 steps for three shards of eight rows, and their counts; T L S R, T L."""
    rows_PR = jnp.arange(24).reshape(3, 8)
    keep = jax.jit(jax.vmap(lambda step: keep_counted(COUNTED_RATES, 5, step, rows_PR)))
    return [np.asarray(array) for array in keep(jnp.arange(4_000))]


def test_counted_rows_are_one_of_the_two_counts_around_the_mean(counted):
    """(1 - p) 8 = 5.6 is 4 with probability 0.2, else 6: the variance is 1.6 * 0.4 = 0.64, that of
    eight independent rows 8 * 0.3 * 0.7 = 1.68."""
    keep_TLSR, which_TL = counted
    count_TL = np.array(row_counts(8))[which_TL]
    np.testing.assert_array_equal(
        keep_TLSR.sum(3), np.broadcast_to(count_TL[..., None], (4000, 5, 3))
    )
    assert [set(column) for column in count_TL.T.tolist()] == [{8}, {4, 6}, {4}, {0, 2}, {0}]
    for layer, (mean, variance) in {1: (5.6, 0.64), 3: (0.8, 0.96)}.items():
        error = np.sqrt(variance / 4_000)
        np.testing.assert_allclose(count_TL[:, layer].mean(), mean, atol=4 * error)
        np.testing.assert_allclose(count_TL[:, layer].var(), variance, rtol=0.1)


def test_each_row_keeps_a_layer_at_its_rate(counted):
    kept_LPR = counted[0].mean(0)
    for rate, kept_SR in zip(COUNTED_RATES, kept_LPR, strict=True):
        error = np.sqrt(rate * (1 - rate) / 4_000)
        np.testing.assert_allclose(kept_SR, 1 - rate, atol=4 * error)


def test_all_sets_of_rows_are_as_likely():
    """Chi-square over the 70 sets of 4 of 8 rows: 99.9% of such sums with 69 degrees of freedom lie
    below 111."""
    rows_PR = jnp.arange(8)[None]
    keep = jax.vmap(lambda step: keep_counted(jnp.array([0.5]), 1, step, rows_PR)[0][0, 0])
    sets = np.asarray(keep(jnp.arange(7_000))) @ 2 ** np.arange(8)
    _, times = np.unique(sets, return_counts=True)
    assert len(times) == 70
    assert ((times - 100) ** 2 / 100).sum() < 111


def test_counted_masks_depend_on_seed_step_layer_and_rows():
    rows = jnp.arange(64)[None]
    rates = jnp.full(2, 0.4)
    keep, _ = keep_counted(rates, 5, 7, rows)
    np.testing.assert_array_equal(keep, keep_counted(rates, 5, 7, rows)[0])
    others = keep_counted(rates, 6, 7, rows), keep_counted(rates, 5, 8, rows)
    others += (keep_counted(rates, 5, 7, rows + 64),)
    for other, _ in others:
        assert (keep != other).any(axis=2).all()
    assert (keep[0] != keep[1]).any()


def test_shards_draw_their_own_rows(counted):
    keep_TLSR = counted[0]
    assert (keep_TLSR[:, 2, 0] != keep_TLSR[:, 2, 1]).any(axis=1).mean() > 0.9
