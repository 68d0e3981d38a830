"""Decoding with a cache is that of transformers for each family."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax import Engine, load
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.cache import KVCache
from tests.marks import long

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = 8


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "olmo3", *long("mistral", "qwen2", "olmo2")])
def test_cached_logits_are_those_of_transformers_past_the_window(name):
    """Token by token, at every exit."""
    golden, model = np.load(GOLDEN / name / "golden.npz"), load(GOLDEN / name)
    tokens_BT, layers = jnp.asarray(golden["tokens"]), model.config.num_layers

    @jax.jit
    def step(start, cache):
        at_BT = jnp.full((len(tokens_BT), 1), start)
        x_BTD, exits = model.embed(jnp.take_along_axis(tokens_BT, at_BT, 1)), []
        for layer in range(layers):
            x_BTD, cache = model.run_layers(x_BTD, layer, layer + 1, at_BT, cache)
            exits.append(model.unembed(x_BTD))
        return jnp.stack(exits), cache

    cache, parts = KVCache.create(model.config, 2, 32, jnp.float32), []
    for start in range(tokens_BT.shape[1]):
        found, cache = step(start, cache)
        parts.append(found)
    expected = jax.jit(lambda: model.unembed(model.exits(tokens_BT)))()
    logits = np.concatenate(parts, 2)
    np.testing.assert_allclose(logits[-1], golden["logits"], atol=2e-4)
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3"])
def test_self_speculation_is_lossless_at_every_exit(name, small_tokenizer):
    golden, model = np.load(GOLDEN / name / "golden.npz"), load(GOLDEN / name)
    drafting = [SelfSpeculative(exit_layer, 3) for exit_layer in range(1, model.config.num_layers)]
    engine, prompts = Engine(model, small_tokenizer), golden["greedy"][:, :PROMPT].tolist()
    for strategy in (Autoregressive(), *drafting):
        engine.use(strategy)
        found = engine.generate(prompts, max_new_tokens=golden["greedy"].shape[1] - PROMPT)
        for completion, expected in zip(found, golden["greedy"], strict=True):
            assert list(completion.token_ids) == expected[PROMPT:].tolist()
