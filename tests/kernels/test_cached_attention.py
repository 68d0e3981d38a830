"""Attention to a cache and writing to it, in every form: against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax import platforms
from lsjax.kernels import cached_attention as module
from lsjax.kernels.cache_blocks import LARGE, SMALL, attend_to_blocks, attend_to_used_slots
from lsjax.kernels.cache_writes import write
from lsjax.kernels.cached_attention import attend, attend_before_writing
from lsjax.model.attention import attention
from lsjax.model.cached_attention import cached_attention
from tests.marks import long
from tests.tunings import tune


def normal(*shapes):
    """Random arrays, by NumPy: JAX would compile a program for each shape."""
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    "beyond, atol", [(2 * SMALL + 1, 0), (LARGE - 9, 1e-6), (LARGE + SMALL - 3, 1e-6)]
)
def test_rows_do_not_see_their_neighbours(model, beyond, atol):
    """A longer neighbour makes more blocks of the cache be read: they add exact zeros. Only where
    blocks become large ones do sums round differently."""
    attend = jax.jit(attend_to_used_slots)
    q, k, v = normal((2, 3, 4, 16), *[(2, 2, LARGE + SMALL, 16)] * 2)
    near = np.array([[5, 6, 7], [5, 6, 7]])
    far = near + [[0], [beyond - 5]]
    np.testing.assert_allclose(attend(q, k, v, near)[0], attend(q, k, v, far)[0], rtol=0, atol=atol)


BORDERS = [5, SMALL - 1, 3 * SMALL - 8]


@pytest.mark.parametrize(
    "position, capacity",
    [
        (0, 3 * SMALL - 7),
        (SMALL, 3 * SMALL - 7),
        (LARGE - 1, LARGE + 3 * SMALL - 7),
        (2 * LARGE * 7 // 8, 2 * LARGE),  # where blocks end
        *long(
            *((at, 3 * SMALL - 7) for at in BORDERS),
            *((at + LARGE, LARGE + 3 * SMALL - 7) for at in (-SMALL, 0, SMALL, *BORDERS)),
            *((2 * LARGE - 1, 2 * LARGE), (LARGE - 2, LARGE), (99, 100)),
            *((2 * LARGE * 7 // 8 + at, 2 * LARGE) for at in (-1, 9)),
        ),
    ],
)
def test_blocks_of_the_cache_equal_plain_attention(position, capacity):
    """At every border of the blocks, and in the last block of a capacity that is no multiple."""
    q, k, v = normal((1, 1, 4, 16), *[(1, 2, capacity, 16)] * 2)
    mask = np.arange(capacity)[None, None] <= position
    plain = jax.jit(attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    # What lies behind the last query may be anything that is a number.
    v[:, :, position + 1 :] = 1e30
    found = jax.jit(attend_to_used_slots)(q, k, v, np.array([[position]]))
    np.testing.assert_allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize("window", [1, SMALL + 9, *long(40, LARGE + 3)])
@pytest.mark.parametrize("position", [0, SMALL + 10, 2 * LARGE - 70, *long(39, LARGE + 2)])
def test_a_window_of_the_cache_equals_plain_attention(position, window):
    """Rows of two lengths; blocks before both windows are not read."""
    capacity = 2 * LARGE
    q, k, v = normal((2, 2, 4, 16), *[(2, 2, capacity, 16)] * 2)
    positions_BT = np.array([[position], [position + 60]]) + np.arange(2)
    back = positions_BT[:, :, None] - np.arange(capacity)
    seen = (back >= 0) & (back < window)
    plain = jax.jit(attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    unseen = (position - window + 1) // LARGE * LARGE
    k[:, :, : max(unseen, 0)] = np.nan
    found = jax.jit(attend_to_used_slots, static_argnums=4)(q, k, v, positions_BT, window)
    np.testing.assert_allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, platforms.TUNINGS["cpu"].unrolled_writes + 1])
def test_writes_land_at_each_row_s_position(batch):
    """Both ways of writing, up to the last slot."""
    capacity, steps = 16, 3
    cache, new = normal((batch, 2, capacity, 4), (batch, steps, 2, 4))
    start = np.arange(batch) % (capacity - steps) + 1
    expected = cache.copy()
    for row in range(batch):
        expected[row, :, start[row] : start[row] + steps] = new[row].swapaxes(0, 1)
    found = jax.jit(write, static_argnums=3)(cache, new.swapaxes(1, 2), start, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window", [None, *long(1, 2, 7)])
@pytest.mark.parametrize("steps, heads", [(1, 4), (3, 4), (1, 2)])
def test_attention_before_the_cache_is_written(monkeypatch, steps, heads, window):
    """An empty row, one that fills its cache, and one between; stale slots are not seen."""
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    shapes = (3, steps, heads, 8), *[(3, 2, steps, 8)] * 2, *[(3, 2, 40, 8)] * 2
    q, k, v, keys, values = normal(*shapes)

    @jax.jit
    def both(q, k, v, keys, values, start_B):
        written = (write(*pair, start_B, 2) for pair in ((keys, k), (values, v)))
        positions_BT = start_B[:, None] + jnp.arange(steps)
        after = cached_attention(q, *written, positions_BT, window)
        return attend_before_writing(q, k, v, keys, values, start_B, window), after

    start_B = np.array([0, 40 - steps, 23])
    found, expected = both(q, k, v, keys, values, start_B)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    stale = (np.arange(40) >= start_B[:, None])[:, None, :, None]
    caches = (np.where(stale, 1e9, cache).astype(np.float32) for cache in (keys, values))
    np.testing.assert_array_equal(both(q, k, v, *caches, start_B)[0], found)


@pytest.mark.parametrize("steps", [1, 3])
def test_all_slots_at_once(steps):
    """The same numbers as in blocks, without a loop or a branch in the lowered program."""
    q, k, v = normal((2, steps, 4, 8), *[(2, 2, 600, 8)] * 2)
    positions_BT = np.array([[5], [411]]) + np.arange(steps)
    lowered = jax.jit(cached_attention).lower(q, k, v, positions_BT)
    found = lowered.compile()(q, k, v, positions_BT)
    for other in (attend_to_used_slots, attend_to_blocks):
        np.testing.assert_allclose(jax.jit(other)(q, k, v, positions_BT), found, atol=1e-6)
    text = lowered.as_text()
    assert "stablehlo.while" not in text and "stablehlo.case" not in text


@pytest.mark.parametrize("most, loops", [(1_800, False), (1_799, True)])
def test_accelerators_read_blocks_only_for_many_scores(monkeypatch, most, loops):
    tune(monkeypatch, reads_used_blocks=False)
    monkeypatch.setattr(module, "MOST_SCORES", most)
    q, k, v, keys, values = normal((2, 3, 4, 8), *[(2, 3, 2, 8)] * 2, *[(2, 2, 600, 8)] * 2)
    run = jax.jit(lambda *arrays: attend(*arrays, None, reference=cached_attention))
    text = run.lower(q, k, v, keys, values, np.zeros((2, 3), np.int32)).as_text()
    assert ("stablehlo.while" in text) == loops
