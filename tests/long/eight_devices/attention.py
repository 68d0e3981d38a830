"""Kernels of attention on a mesh, interpreted; run by test_eight_devices.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import MeshConfig
from lsjax.kernels import self_attention as module
from lsjax.model.attention import self_attention
from lsjax.platforms import platform
from lsjax.sharding import make_mesh

EIGHTHS = [1, 1, 1, 2, 2, 2, 2, 0]


@partial(jax.jit, static_argnums=0)
def with_gradients(kernel, q, k, v, dy):
    segments = jnp.tile(jnp.repeat(jnp.asarray(EIGHTHS), q.shape[1] // 8), (4, 1))
    y, pullback = jax.vjp(lambda *qkv: self_attention(*qkv, segments, kernel), q, k, v)
    return y, *pullback(dy)


@pytest.mark.parametrize("kv_heads", [2, 3])  # the tensor axis divides them, or does not
@pytest.mark.parametrize("kernel, steps, size", [("splash", 8, 4), ("flash", 128, 16)])
def test_each_device_has_its_rows_and_heads(kernel, steps, size, kv_heads, monkeypatch):
    rng = np.random.default_rng(0)
    heads = (2 * kv_heads, kv_heads, kv_heads, 2 * kv_heads)
    arrays = [rng.normal(size=(4, steps, n, size)).astype(np.float32) for n in heads]
    expected = with_gradients("xla", *arrays)
    shapes = []
    run = module._run

    def noted(kernel, window, reference, places, q, *rest):
        shapes.append(q.shape)
        return run(kernel, window, reference, places, q, *rest)

    monkeypatch.setattr(module, "_run", noted)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert platform() == "cpu"
        found = with_gradients(kernel, *arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert set(shapes) == {(1, steps, 2 if kv_heads == 2 else 6, size)}
