"""Products with backward passes of their own: the values and gradients of the plain expressions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax import platforms
from lsjax.kernels.matmuls import enough_rows, enough_steps, linear, with_table
from lsjax.kernels.swiglu import swiglu
from tests.tunings import tune


def plain_swiglu(gate_up):
    gate, up = jnp.unstack(gate_up, axis=-2)
    return gate / (1 + jnp.exp(-gate)) * up


CASES = {
    "linear": (linear, lambda x, w: jnp.einsum("bti,ikh->btkh", x, w), [(2, 3, 4), (4, 2, 5)]),
    "linear, computed again": (
        lambda x, w: linear(x, w, may_recompute=True),
        lambda x, w: jnp.einsum("bti,ikh->btkh", x, w),
        [(2, 3, 4), (4, 2, 5)],
    ),
    "swiglu": (swiglu, plain_swiglu, [(2, 3, 2, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_plain_expression(name, monkeypatch):
    tune(monkeypatch, recomputes_projection=True)
    product, plain, shapes = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in shapes]
    along = rng.normal(size=jax.eval_shape(plain, *arrays).shape)

    def with_gradients(f):
        y, pullback = jax.vjp(f, *arrays)
        return y, *pullback(along)

    with jax.enable_x64():
        found, expected = (jax.jit(with_gradients, static_argnums=0)(f) for f in (product, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("platform, rows", [("cpu", 1), ("tpu", 8), ("gpu", 16)])
def test_rows_of_a_product(monkeypatch, platform, rows):
    """Accelerators get as many as reach the matrix unit, and zeros in what was added."""
    monkeypatch.setattr(platforms, "platform", lambda: platform)
    x_BTD = jnp.ones((1, 1, 6))
    for padded in (enough_steps(x_BTD), *([enough_rows(x_BTD)] if platform == "tpu" else [])):
        assert padded.shape == (1, rows, 6)
        np.testing.assert_array_equal(padded[:, :1], x_BTD)
        assert (padded[:, 1:] == 0).all()
    assert enough_steps(jnp.ones((3, 1, 6))).shape == (3, -(-rows // 3), 6)
    assert enough_steps(jnp.ones((2, 20, 6))).shape == (2, 20, 6)
    lowered = jax.jit(lambda x: enough_rows(x)).lower(x_BTD)
    assert ("optimization_barrier" in lowered.as_text()) == (platform == "tpu")


@pytest.mark.parametrize("platform, summed", [("cpu", {2, 3, 4}), ("tpu", set())])
def test_logits_of_a_few_rows(monkeypatch, platform, summed):
    """Those of the plain product, for any number of rows. Only CPUs sum them, up to four rows."""
    monkeypatch.setattr(platforms, "platform", lambda: platform)
    keys = jax.random.split(jax.random.key(0))
    table_VD = jax.random.normal(keys[0], (50, 64), jnp.bfloat16)
    for rows in (1, 2, 3, 4, 5):
        x_RD = jax.random.normal(keys[1], (rows, 64), jnp.bfloat16)
        found = with_table(x_RD, table_VD)
        assert found.dtype == jnp.float32
        expected = np.asarray(x_RD, np.float64) @ np.asarray(table_VD, np.float64).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        lowered = jax.jit(lambda x: with_table(x, table_VD)).lower(x_RD)
        assert ("dot_general" not in lowered.as_text()) == (rows in summed)


@pytest.mark.parametrize("name", ["linear", "swiglu"])
def test_in_bfloat16_only_the_results_are_rounded(name):
    """Sums are wider: of 512 products the error is that of one rounding, not of many."""
    product, plain, shapes = CASES[name]
    shapes = [(2, 3, 512), (512, 2, 5)] if name == "linear" else shapes
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(jnp.bfloat16) for shape in shapes]
    dy = rng.normal(size=jax.eval_shape(product, *arrays).shape).astype(jnp.bfloat16)

    def with_gradients(f, dtype):
        y, pullback = jax.vjp(f, *(array.astype(dtype) for array in arrays))
        return y, *pullback(dy.astype(dtype))

    run = jax.jit(with_gradients, static_argnums=(0, 1))
    found, expected = run(product, jnp.bfloat16), run(plain, jnp.float32)
    # SwiGLU has some roundings in a row, and a difference of numbers that may be near each other.
    bound, share = (2**-8, 1e-2) if name == "linear" else (2**-6, 0.5)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        error = np.abs(one - other)
        assert (error <= bound * (np.abs(other) + share * np.abs(other).max())).all()
