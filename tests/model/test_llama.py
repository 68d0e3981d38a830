"""The model: causality, cached equals whole, separate equals stacked, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import ConfigError, LlamaConfig
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.model.matrices import cast_matrices
from tests.marks import long

TOKENS = jax.random.randint(jax.random.key(1), (3, 21), 0, 258)


def normal(*shapes):
    """Random arrays, by NumPy: JAX would compile a program for each shape."""
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def cached_exits(model, tokens_BT, sizes, capacity=600):
    """Outputs of every layer when the tokens come in pieces of the given sizes."""
    model = unstacked(model)
    cache = KVCache.create(model.config, len(tokens_BT), capacity, model.dtype)
    pieces, start = [], 0
    for size in sizes:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (len(tokens_BT), size))
        x, outputs = model.embed(tokens_BT[:, start : start + size]), []
        for layer in range(model.config.num_layers):
            x, cache = model.run_layers(x, layer, layer + 1, positions, cache)
            outputs.append(x)
        pieces.append(jnp.stack(outputs))
        start += size
    return jnp.concatenate(pieces, axis=2)


@pytest.mark.parametrize("form", [unstacked, stacked])
@pytest.mark.parametrize("sizes", [(21,), *long(((5, 1, 1, 1, 6, 7),))])
def test_cached_equals_the_whole_forward_at_every_exit(model, sizes, form):
    whole = jax.jit(lambda model: model.exits(TOKENS))(model)
    found = jax.jit(lambda model: cached_exits(model, TOKENS, sizes))(form(model))
    logits = jax.jit(lambda model, x: model.unembed(x))
    np.testing.assert_allclose(logits(model, found), logits(model, whole), atol=2e-4)


def test_no_output_depends_on_a_later_token(model):
    """The gradient of position t's output with respect to the embeddings after t is zero."""
    size = TOKENS.shape[1]

    def output(x_TD, t):
        mapped = jax.tree.map(lambda leaf: leaf, model)
        mapped.embedding = nnx.Param(x_TD)  # then token i is embedded as x_TD[i]
        return (mapped.exits(jnp.arange(size)[None])[-1, 0, t] * jnp.arange(x_TD.shape[1])).sum()

    gradient = jax.jit(jax.grad(output))
    for t in (0, 7, size - 1):
        gradient_TD = gradient(model.embed(TOKENS[:1])[0], t)
        reach_T = np.abs(gradient_TD).max(-1)
        assert (reach_T[t + 1 :] == 0).all()
        assert (reach_T[: t + 1] > 0).all()


def test_stacked_and_separate_layers_are_the_same_model(model):
    forward = jax.jit(lambda model: model.exits(TOKENS))
    np.testing.assert_allclose(forward(stacked(model)), forward(model), atol=1e-5)
    again = unstacked(stacked(model))
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(model)))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        config = LlamaConfig.tiny()
        wide = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float64))()
        assert jax.jit(lambda model: model(TOKENS[:1]))(wide).dtype == jnp.float64


def test_bfloat16_weights_give_float32_logits(model):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    forward = jax.jit(lambda model: (model(TOKENS), model.exits(TOKENS)))
    logits, exits = forward(narrow)
    assert logits.dtype == jnp.float32
    assert exits.dtype == jnp.bfloat16
    assert np.corrcoef(logits.ravel(), forward(model)[0].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("scaled, expected", [(True, 0.005), *long((False, 0.02))])
def test_what_writes_to_the_residual_stream_may_start_smaller(scaled, expected):
    """0.02 / sqrt(2 * 8) is 0.005; what reads from it starts at 0.02 either way."""
    config = LlamaConfig.tiny(num_layers=8, init_std=0.02, scaled_init=scaled)
    new = jax.jit(lambda: stacked(Llama(config, rngs=nnx.Rngs(0))))()
    attention, feed_forward = new.layers.attention, new.layers.feed_forward
    for writes in (attention.out, feed_forward.down):
        np.testing.assert_allclose(jnp.std(writes.kernel[...]), expected, rtol=0.02)
    for reads in (attention.qkv, feed_forward.gate_up):
        np.testing.assert_allclose(jnp.std(reads.kernel[...]), 0.02, rtol=0.02)


@pytest.mark.parametrize(
    "preset, published",
    [
        ("smollm2_135m", 134_515_008),
        ("llama3_2_1b", 1_235_814_400),
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    config = getattr(LlamaConfig, preset)()
    assert config.num_params == published
    abstract = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == config.num_params


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        LlamaConfig.tiny(**changes)


def test_embed_sums_the_gradient_of_a_row_in_float32(config):
    """Over all places of its token; bfloat16 counts to 256."""
    model = jax.jit(lambda: cast_matrices(Llama(config, rngs=nnx.Rngs(0)), "bfloat16"))()
    tokens_BT = jnp.array([[1, 1, 4], [1, 0, 1]])
    x_BTD = model.embed(tokens_BT)
    assert x_BTD.dtype == jnp.bfloat16
    table_VD = model.embedding[...]
    np.testing.assert_array_equal(x_BTD, table_VD.astype(jnp.bfloat16)[tokens_BT])

    many_BT = jnp.ones((1, 3000), int)
    summed = jax.grad(lambda model: model.embed(many_BT).astype(jnp.float32).sum())
    gradient = jax.jit(summed)(model)
    expected = np.zeros(table_VD.shape)
    expected[1] = 3000
    np.testing.assert_array_equal(gradient.embedding[...], expected)
