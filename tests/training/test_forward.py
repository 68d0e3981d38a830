"""The layers in training: dropout, segments, remat."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax import platforms
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.kernels import flash
from lsjax.model import block
from lsjax.model.rope import rope_angles
from lsjax.training.forward import layer_runner
from lsjax.training.layer_dropout import keep_mask
from lsjax.training.loss import objective
from tests.marks import long
from tests.tunings import tune

EXITS = EarlyExitConfig(curriculum="rotational", rotation=2, e_scale=0.5)
PLAIN = StepConfig(num_steps=8, early_exit=EXITS)


def dropping(**changes) -> StepConfig:
    return StepConfig(num_steps=8, early_exit=EXITS, layer_dropout=LayerDropoutConfig(**changes))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), found, expected)


@pytest.mark.long
@pytest.mark.parametrize("skip", ["mask", "gather", "batch"])
def test_rate_zero_is_no_dropout_bit_for_bit(small, packed, evaluate, skip):
    """Here with masks, all of which keep."""
    dropout = LayerDropoutConfig(p_max=0.5, distribution="uniform", layers=(), skip=skip)
    plain = StepConfig(num_steps=8)
    none = dataclasses.replace(plain, layer_dropout=dropout)
    assert_equal(evaluate(none, small, packed, 1), evaluate(plain, small, packed, 1))


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(skip="batch"),
        dict(skip="gather"),
        dict(skip="gather", rescale=True),
        dict(rescale=True),
    ],
)
def test_rate_one_is_the_model_without_the_layer(wide, packed, evaluate, changes):
    last_only = StepConfig(num_steps=8)
    config = StepConfig(
        num_steps=8,
        layer_dropout=LayerDropoutConfig(p_max=1.0, distribution="uniform", layers=(2,), **changes),
    )
    (loss, _), gradients = evaluate(config, wide, packed)
    shorter = jax.tree.map(lambda leaf: leaf, wide)
    shorter.layers = jax.tree.map(lambda leaf: jnp.delete(leaf, 2, axis=0), wide.layers)
    shorter.config = dataclasses.replace(wide.config, num_layers=4)
    (expected, _), expected_gradients = evaluate(last_only, shorter, packed)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for leaf in jax.tree.leaves(gradients.layers):
        assert (leaf[2] == 0).all()
    kept = jax.tree.map(lambda leaf: jnp.delete(leaf, 2, axis=0), gradients.layers)
    assert_close(jax.tree.leaves(kept), jax.tree.leaves(expected_gradients.layers))


@pytest.mark.parametrize("rescale", [True, *long(False)])
def test_each_row_goes_without_the_layers_of_its_mask(wide, packed, evaluate, rescale):
    """Against a loop over rows and layers."""
    config = StepConfig(
        num_steps=8,
        seed=4,
        layer_dropout=LayerDropoutConfig(p_max=0.5, distribution="uniform", rescale=rescale),
    )
    keep_LB = np.asarray(jax.jit(keep_mask)(jnp.full(5, 0.5), 4, 3, jnp.arange(4)))
    assert (keep_LB.any(1) & ~keep_LB.all(1)).sum() >= 3  # layers that rows differ in
    batch = {name: jnp.asarray(array) for name, array in packed.items()}
    x_BTD = wide.embed(batch["tokens_BT"])
    rope = rope_angles(batch["positions_BT"], wide.config, x_BTD.dtype)["full"]
    run = jax.jit(lambda block, x_BTD: block(x_BTD, rope, batch["segments_BT"]))
    for index, keep_B in enumerate(keep_LB):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], wide.layers)
        added_BTD = run(block, x_BTD) - x_BTD
        x_BTD += keep_B[:, None, None] * added_BTD * (2 if rescale else 1)
    logp_BTV = np.asarray(jax.jit(lambda x: jax.nn.log_softmax(wide.unembed(x)))(x_BTD))
    expected = -sum(
        logp_BTV[row, at, packed["labels_BT"][row, at]]
        for row, at in np.argwhere(packed["labels_BT"] >= 0)
    )
    (_, sums_L), _ = evaluate(config, wide, packed, 3)
    np.testing.assert_allclose(sums_L[-1], expected, rtol=1e-12)


def test_segments_never_see_one_another(small, packed):
    """The gradient of a token's loss reaches the tokens of its own document up to it, no others."""
    config = StepConfig(num_steps=1)
    segments = packed["segments_BT"][0]

    @jax.jit
    def reach(labels_T):
        batch = {name: jnp.asarray(array[:1]) for name, array in packed.items()}
        # Each token is another one, so that the gradient of its embedding is that of the token.
        batch |= {"tokens_BT": jnp.arange(9)[None], "labels_BT": labels_T[None]}
        differentiated = jax.grad(partial(objective, config), has_aux=True)
        gradient, _ = differentiated(small, batch, 0, jnp.arange(1), 1)
        return jnp.abs(gradient.embedding[...]).max(1)[:9]

    for at in (0, 2, 3, 4, 6, 8):
        reached = np.asarray(reach(jnp.full(9, -1).at[at].set(5))) > 0
        expected = (segments == segments[at]) & (np.arange(9) <= at)
        np.testing.assert_array_equal(reached, expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "remat", ["nothing_saveable", "attention", "dots_with_no_batch_dims_saveable"]
)
def test_remat_changes_nothing(wide, packed, evaluate, remat):
    plain = dropping(p_max=0.4, distribution="uniform")
    again = dataclasses.replace(plain, remat=remat)
    assert_close(evaluate(again, wide, packed, 1), evaluate(plain, wide, packed, 1))


@pytest.mark.long
def test_the_kernel_of_attention_changes_nothing(small, packed, evaluate):
    """Where it is wrapped most: gathered rows, in branches, with what it gives saved by name."""
    batch = {name: array[:2] for name, array in packed.items()}
    plain = dropping(p_max=0.6, distribution="linear", skip="gather")
    splash = dataclasses.replace(plain, attention="splash")
    assert_close(evaluate(splash, small, batch, 1), evaluate(plain, small, batch, 1), atol=2e-5)


@pytest.mark.parametrize(
    "remat, runs", [("dots_saveable", 1), ("attention", 1), ("nothing_saveable", 2)]
)
def test_what_a_kernel_gives_is_kept_as_products_are(small, packed, monkeypatch, remat, runs):
    """How often the gradient's program for a TPU runs the kernel forward, beside two backward."""
    for module in (platforms, flash):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    config = StepConfig(num_steps=1, attention="splash", remat=remat)
    differentiated = jax.jit(jax.grad(partial(objective, config), has_aux=True))
    traced = differentiated.trace(small, packed, 0, jnp.arange(4), 9)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == runs + 2


LAYER, QUERIES, KEYS, SUMS = (1, 128, 48), (1, 128, 4, 16), (1, 128, 2, 16), (1, 4, 128)


@pytest.mark.long
@pytest.mark.parametrize(
    "remat, kept",
    [
        # The joined matrix gives queries, keys and values together. The projection is not kept.
        ("dots_with_no_batch_dims_saveable", [LAYER, (1, 128, 2, 4, 16), QUERIES, SUMS, "gate_up"]),
        # Queries, keys, values, and what attention gives; the state before and after it.
        ("attention", [LAYER, LAYER, QUERIES, KEYS, KEYS, QUERIES, SUMS]),
        ("attention_output", [LAYER, LAYER, QUERIES, SUMS]),
        ("nothing_saveable", [LAYER]),
    ],
)
def test_what_a_layer_keeps_on_gpus(monkeypatch, remat, kept):
    """Shapes of what its backward pass reads, beside its parameters."""
    tune(monkeypatch, recomputes_projection=True)
    shape = LlamaConfig.tiny(hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16)
    layer = block.Block(shape, dtype=jnp.float32, rngs=nnx.Rngs(0))
    ropes = rope_angles(jnp.arange(128)[None], shape, jnp.float32)
    config = StepConfig(num_steps=1, attention="flash", remat=remat)
    run = layer_runner(config, ropes, jnp.zeros((1, 128), jnp.int32))
    _, pullback = jax.vjp(
        lambda *arrays: run(*arrays, None, shape.layer_kind(0)), layer, jnp.ones(LAYER)
    )
    parameters = {leaf.shape for leaf in jax.tree.leaves(layer)}
    found = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.ndim > 2]
    found = sorted(each for each in found if each not in parameters and each[-1] != 8)
    gate_up = (1, 128, 2, shape.intermediate_size)
    assert found == sorted(gate_up if each == "gate_up" else each for each in kept)
