"""Training steps of families whose layers are of several kinds."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax import load
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, StepConfig
from lsjax.model.cache import KVCache
from lsjax.model.llama import stacked, unstacked
from lsjax.training.loss import objective
from tests.marks import long

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.long
@pytest.mark.parametrize("name", ["olmo3", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_gradients_are_those_of_separate_layers(name):
    """Stacked layers of several kinds are a scan over periods; here with packed rows and remat."""
    model, rng = load(GOLDEN / name), np.random.default_rng(0)
    layers, shape = model.config.num_layers, (3, 20)
    segments = np.repeat([[1, 2], [1, 0], [1, 2]], 10, axis=1)
    tokens = rng.integers(3, 64, shape)
    labels = np.where(segments > 0, np.roll(tokens, -1, 1), -1)
    batch = dict(tokens_BT=tokens, labels_BT=labels, segments_BT=segments)
    batch["positions_BT"] = np.tile(np.arange(10), (3, 2))
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    exits = EarlyExitConfig(curriculum="subset", exits=(1, 2), weights="uniform")
    config = StepConfig(num_steps=4, early_exit=exits, remat="nothing_saveable")

    def by_step(model):
        rows, count = jnp.arange(3), (batch["labels_BT"] >= 0).sum()
        return objective(config, model, batch, 0, rows, count)[0]

    def by_hand(model):
        names = ("tokens_BT", "positions_BT", "segments_BT")
        logits = unstacked(model).exits(*(batch[name] for name in names), read=model.unembed)
        losses = -jax.nn.log_softmax(logits)
        at = jnp.maximum(batch["labels_BT"], 0)[None, :, :, None]
        losses = jnp.take_along_axis(losses, at, -1)[..., 0] * (batch["labels_BT"] >= 0)
        weights = np.isin(np.arange(1, layers + 1), (1, 2, layers))
        return (losses.sum((1, 2)) * weights).sum() / weights.sum() / (segments > 0).sum()

    results = [jax.jit(jax.value_and_grad(f))(stacked(model)) for f in (by_step, by_hand)]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[0]))


@pytest.mark.parametrize("skip", ["gather", *long("mask", "batch")])
def test_a_dropped_layer_is_the_same_in_every_form(skip):
    """Layers 1 and 3, of two kinds, never run."""
    model = load(GOLDEN / "olmo3")
    dropout = LayerDropoutConfig(p_max=1.0, distribution="uniform", layers=(1, 2), skip=skip)
    config = StepConfig(num_steps=4, layer_dropout=dropout)
    tokens = jnp.asarray(np.load(GOLDEN / "olmo3" / "golden.npz")["tokens"])
    batch = dict(tokens_BT=tokens, labels_BT=tokens, segments_BT=jnp.ones_like(tokens))
    batch["positions_BT"] = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda model: objective(config, model, batch, 0, jnp.arange(2), tokens.size)[0])
    loss = run(stacked(model))
    ropes_and_kinds = [model.config.layer_kind(layer) for layer in (0, 3)]
    assert ropes_and_kinds[0] != ropes_and_kinds[1]

    @jax.jit
    def without(model):
        cache, x_BTD = KVCache.create(model.config, 2, 32, jnp.float32), model.embed(tokens)
        for layer in (0, 3):
            x_BTD, cache = model.run_layers(x_BTD, layer, layer + 1, batch["positions_BT"], cache)
        losses = -jax.nn.log_softmax(model.unembed(x_BTD))
        return jnp.take_along_axis(losses, tokens[..., None], -1).mean()

    expected = without(model)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
