"""The GPU kernel of attention against products and a softmax; here it is interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.kernels.flash import OWN, _first, _last, flash_attention
from lsjax.model.attention import self_attention
from tests.marks import long

T = 3 * OWN
# Documents that begin within blocks and fill some, of one token too, and padding; two halves.
LENGTHS = ((90, 1, 80, 177, 36), (OWN + 64, OWN + 64))
SEGMENTS = [np.repeat((*range(1, len(row)), 0), row) for row in LENGTHS]
SEGMENTS = jnp.asarray(np.stack(SEGMENTS).astype(np.int32))


def arrays(heads, kv_heads, size, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(len(SEGMENTS), T, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, segments, dy):
    y, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    return y, *pullback(dy)


xla = partial(self_attention, kernel="xla")


@pytest.mark.parametrize("heads, kv_heads, size", [(6, 2, 64), *long((2, 2, 128), (3, 1, 16))])
def test_values_and_gradients(heads, kv_heads, size):
    q, k, v, dy = arrays(heads, kv_heads, size)
    found = with_gradients(flash_attention, q, k, v, SEGMENTS, dy)
    expected = with_gradients(xla, q, k, v, SEGMENTS, dy)
    one_document = with_gradients(xla, q, k, v, None, dy)
    for one, other, without in zip(found, expected, one_document, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
        assert np.abs(one - without).max() > 0.1


@pytest.mark.parametrize("window", [50, *long(1, OWN + 3)])
def test_a_window_hides_what_lies_before_it(window):
    q, k, v, dy = arrays(4, 2, 16)
    found = with_gradients(partial(flash_attention, window=window), q, k, v, SEGMENTS, dy)
    expected = with_gradients(partial(xla, window=window), q, k, v, SEGMENTS, dy)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("size", [64, *long(128)])
def test_bfloat16_is_about_as_far_from_float32_as_xla(size):
    """By the root of the mean square."""
    q, k, v, dy = arrays(4, 2, size, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v, dy)]
    exact = with_gradients(xla, *wide[:3], SEGMENTS, wide[3])

    def errors(attend):
        found = with_gradients(attend, q, k, v, SEGMENTS, dy)
        assert all(one.dtype == jnp.bfloat16 for one in found)
        return [
            float(jnp.sqrt(jnp.mean((one - other) ** 2) / jnp.mean(other**2)))
            for one, other in zip(found, exact, strict=True)
        ]

    for one, other in zip(errors(flash_attention), errors(xla), strict=True):
        assert one < 1.75 * other < 0.01  # xla differentiates weights in float32


def test_first_and_last_tokens_of_documents():
    np.testing.assert_array_equal(_first(SEGMENTS), [[0, 91, 171], [0, 0, 192]])
    np.testing.assert_array_equal(_last(SEGMENTS), [[170, 347, 383], [191, 383, 383]])
    np.testing.assert_array_equal(_first(SEGMENTS, 60), [[0, 91, 197], [0, 69, 197]])
    np.testing.assert_array_equal(_last(SEGMENTS, 60), [[170, 314, 383], [186, 314, 383]])


def test_hidden_blocks_are_not_visited():
    """What is not a number in them would show, even with a weight of 0."""
    q, k, v, dy = (x[:1] for x in arrays(2, 1, 16))
    segments = jnp.repeat(jnp.arange(3), OWN)[None]
    run = partial(with_gradients, flash_attention)
    clean = run(q, k, v, segments, dy)
    spoilt = run(*(x.at[:, OWN : 2 * OWN].set(jnp.nan) for x in (q, k, v)), segments, dy)
    for one, other in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(one[:, :OWN], other[:, :OWN])
        np.testing.assert_array_equal(one[:, 2 * OWN :], other[:, 2 * OWN :])
        assert np.isnan(one[:, OWN : 2 * OWN]).any()
