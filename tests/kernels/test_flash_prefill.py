"""The kernels that read prompts on TPUs and GPUs, interpreted, against plain attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.kernels import flash_prefill as module
from lsjax.kernels.flash_prefill import TPU_SLOTS, flash_prefill
from lsjax.model.cached_attention import cached_attention
from tests.marks import long

# Heads, K/V heads, head size, slots, new tokens, and where they begin in each row.
CASES = {
    "a fresh prompt": (4, 2, 16, 64, 32, [0]),
    "rows that go on": (4, 2, 32, 1344, 64, [1, 700, 1280]),
    "blocks of queries": (12, 1, 16, 640, 256, [0, 300]),  # 3,072 rows: three blocks on TPUs
}
LONG = ("a fresh prompt", "blocks of queries")
SHORT = [name for name in CASES if name not in LONG]


@pytest.fixture(params=["tpu", "gpu"])
def kernel(request, monkeypatch):
    """The kernel of a platform."""
    monkeypatch.setattr(module, "tuned_for", lambda: request.param)
    return jax.jit(
        lambda *given, window=None: flash_prefill(*given, window), static_argnames="window"
    )


def arrays(name, dtype=jnp.float32):
    """The slots behind a row are full of large numbers."""
    heads, kv_heads, size, slots, steps, starts = CASES[name]
    rng, batch = np.random.default_rng(0), len(starts)
    start_B = np.array(starts, np.int32)
    stale = np.arange(slots)[:, None] >= (start_B + steps)[:, None, None, None]
    q = rng.normal(size=(batch, steps, heads, size))
    keys, values = rng.normal(size=(2, batch, kv_heads, slots, size))
    made = (
        jax.device_put(x.astype(dtype))
        for x in (q, *(np.where(stale, 1e6, x) for x in (keys, values)))
    )
    return *made, start_B


@partial(jax.jit, static_argnames="window")
def plain(q, keys, values, start_B, window=None):
    return cached_attention(q, keys, values, start_B[:, None] + jnp.arange(q.shape[1]), window)


@pytest.mark.parametrize("name", [*SHORT, *long(*LONG)])
def test_attention(kernel, name):
    given = arrays(name)
    np.testing.assert_allclose(kernel(*given), plain(*given), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [70, *long(3, TPU_SLOTS + 1)])
@pytest.mark.parametrize("name", [*SHORT, *long(*LONG)])
def test_a_window_hides_what_lies_before_it(kernel, name, window):
    given = arrays(name)
    found, expected = kernel(*given, window=window), plain(*given, window=window)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT)
def test_bfloat16_is_as_near_as_plain_products(kernel, name):
    given = arrays(name, jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in given[:-1]), given[-1])
    mine, other = (np.abs(np.asarray(f(*given), np.float32) - exact).max() for f in (kernel, plain))
    assert mine <= max(1.25 * other, 1e-6)
