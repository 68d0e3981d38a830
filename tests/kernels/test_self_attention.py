"""Attention's kernels against plain expressions; the TPU's is interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax import platforms
from lsjax.config import ConfigError
from lsjax.kernels import flash, self_attention as module
from lsjax.model.attention import self_attention
from tests.marks import long

B, T, N, K, H = 2, 200, 4, 2, 16  # no whole number of blocks
# Two documents and padding; three documents.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [90, 80, 30]), np.repeat([1, 2, 3], [130, 1, 69])])
SEGMENTS = jnp.asarray(SEGMENTS.astype(np.int32))


def arrays(dtype=jnp.float32, shapes=((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))):
    rng = np.random.default_rng(0)
    return [jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def plain(q, k, v, segments, window=None):
    """In NumPy's order of things: every query beside its own copy of a key."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    places = np.arange(q.shape[1])
    back = places[:, None] - places
    seen = (back >= 0) & (back < (window or len(places)))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)


@partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, segments, dy):
    y, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    return y, *pullback(dy)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Several of them, so that some are skipped and some are cut by the diagonal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "SPLASH_BLOCKS", (128,))
        yield


@pytest.fixture(scope="module")
def splash():
    q, k, v, dy = arrays()
    dy = dy * (SEGMENTS > 0)[:, :, None, None]  # of no label, no gradient
    run = partial(self_attention, kernel="splash")
    return with_gradients(run, q, k, v, SEGMENTS, dy)


@pytest.mark.parametrize("kernel", ["plain", "xla"])
def test_splash_is_the_same_attention_gradients_too(splash, kernel):
    q, k, v, dy = arrays()
    dy = dy * (SEGMENTS > 0)[:, :, None, None]
    other = plain if kernel == "plain" else partial(self_attention, kernel="xla")
    expected = with_gradients(other, q, k, v, SEGMENTS, dy)
    for found, wanted in zip(splash, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    without = with_gradients(other, q, k, v, jnp.ones_like(SEGMENTS), dy)
    for found, wanted in zip(splash, without, strict=True):
        assert np.abs(found - wanted).max() > 0.1


@pytest.mark.parametrize("window", [40, *long(1, 129)])
@pytest.mark.parametrize("kernel", ["splash", "xla"])
@pytest.mark.parametrize("packed", [True, *long(False)])
def test_a_window_hides_what_lies_before_it(kernel, window, packed):
    q, k, v, dy = arrays()
    segments = SEGMENTS if packed else None
    found = with_gradients(
        partial(self_attention, kernel=kernel, window=window), q, k, v, segments, dy
    )
    expected = with_gradients(partial(plain, window=window), q, k, v, segments, dy)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    without = with_gradients(plain, q, k, v, segments, dy)
    assert np.abs(found[0] - without[0]).max() > 0.01


def test_padding_gives_numbers_and_no_gradients(splash):
    y, *gradients = splash
    assert np.isfinite(y).all()
    for gradient in gradients:
        assert (gradient[0, 170:] == 0).all()
        assert (np.abs(gradient[0, 90:170]).max((1, 2)) > 0).all()


def test_one_document_and_bfloat16():
    shapes = ((1, 128, 2, H),) * 4  # a query head to each key head
    exact = with_gradients(plain, *arrays(shapes=shapes)[:3], None, arrays(shapes=shapes)[3])
    q, k, v, dy = arrays(jnp.bfloat16, shapes)
    found = with_gradients(partial(self_attention, kernel="splash"), q, k, v, None, dy)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.06)


def test_the_devices_choose(monkeypatch):
    q, k, v, _ = arrays(jnp.bfloat16)

    def kernels(q, kernel="auto"):
        run = partial(self_attention, segments_BT=SEGMENTS[:, : q.shape[1]], kernel=kernel)
        return str(jax.make_jaxpr(run)(q, q, q))

    assert "pallas_call" not in kernels(q)
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    assert "name=splash_mha_fwd_segmented" in kernels(q)
    with jax.enable_x64():
        assert "pallas_call" not in kernels(jnp.zeros(q.shape, float))
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    assert "pallas_call" not in kernels(q)  # no GPU here
    monkeypatch.setattr(module, "nvidia_capability", lambda: 9.0)
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        kernels(q)  # as 128 does not divide the length
    assert "name=flash_forward" in kernels(q[:, :128])
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.make_jaxpr(self_attention)(q[:, :128], q[:, :128], q[:, :128])  # one document
    kernels(q[:, :128].astype(jnp.float32))
    kernels(q[:, :-1])
    for array, kernel, message in (
        (q, "splash", "'splash' is for TPUs, but this program is for gpu"),
        (q.astype(jnp.float32), "cudnn", "takes float16 and bfloat16, not float32"),
        (q[..., :-1], "cudnn", "takes head sizes of 8, 16, ... 128, not 15"),
        (q.astype(jnp.float32), "flash", "takes float16 and bfloat16, not float32"),
        (q[..., :-8], "flash", "takes head sizes of 16, 32, 64, ..., not 8"),
        (q, "flash", "takes lengths that 128 divides, not 200"),
    ):
        with pytest.raises(ConfigError, match=message):
            kernels(array, kernel)


def test_gradients_have_the_dtype_of_the_arrays():
    """The cotangents of bfloat16 are bfloat16, with the softmax in between in float32."""
    (q,) = arrays(jnp.bfloat16, [(1, 4, 1, 8)])

    @jax.jit
    def gradients(*arrays):
        run = partial(self_attention, kernel="xla")
        return jax.grad(lambda *qkv: run(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    found, expected = gradients(q, q, q), gradients(*[q.astype(jnp.float32)] * 3)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)
