"""Rope by slices and by a permutation: the same values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import LlamaConfig
from lsjax.kernels import rope as kernels
from lsjax.model.rope import rope_angles, rotate
from tests.tunings import tune

CONFIG = LlamaConfig.tiny(head_dim=16)
SHAPE = (2, 5, 3, 16)  # B, T, N, H
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [7, 900, 0, 1, 2]])


def angles(dtype, whole):
    """whole: of all channels, for the permutation."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tune(monkeypatch, rotates_by_matmul=whole)
        return kernels.for_training(rope_angles(POSITIONS, CONFIG, dtype))["full"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_turn_alike(dtype):
    x, dy = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(dtype)

    @partial(jax.jit, static_argnums=0)
    def with_gradient(whole):
        sin, cos = angles(dtype, whole)
        assert sin.dtype == jnp.float32 and sin.shape[-1] == (16 if whole else 8)
        y, pullback = jax.vjp(lambda x: kernels.rotate(x, (sin, cos), rotate), x)
        return y, *pullback(dy)

    results = [with_gradient(whole) for whole in (False, True)]
    for plain, product in zip(*results, strict=True):
        assert product.dtype == dtype
        np.testing.assert_allclose(product, plain, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(results[1][0]) - x).max() > 0.5


def test_remat_keeps_no_swapped_halves(capsys):
    """The policy keeps a product without a batch axis, and computes one with it again."""
    w = jnp.ones((16, 16))
    rope = angles(jnp.float32, True)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @partial(jax.checkpoint, policy=policy)
    def turned(x, w):
        return jnp.sin(kernels.rotate(jnp.sin(x) @ w, rope, rotate)).sum()

    jax.ad_checkpoint.print_saved_residuals(turned, jnp.ones(SHAPE), w)
    kept = [line for line in capsys.readouterr().out.splitlines() if "dot_general" in line]
    assert len(kept) == 1
