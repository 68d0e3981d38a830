"""The model: causality, cached equals whole, separate equals stacked, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax import platforms
from lsjax.config import ConfigError, LlamaConfig
from lsjax.model.attention import attention
from lsjax.model.cache import KVCache, write
from lsjax.model.cached_attention import LARGE, SMALL, attention_before_writing, cached_attention
from lsjax.model.llama import Llama, cast_matrices, stacked, unstacked
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


@pytest.mark.parametrize(
    "beyond, atol", [(2 * SMALL + 1, 0), (LARGE - 9, 1e-6), (LARGE + SMALL - 3, 1e-6)]
)
def test_rows_do_not_see_their_neighbours(model, beyond, atol):
    """A longer neighbour makes more blocks of the cache be read: they add exact zeros. Only where
    blocks become large ones do sums round differently."""
    attend = jax.jit(cached_attention)
    q, k, v = normal((2, 3, 4, 16), *[(2, 2, LARGE + SMALL, 16)] * 2)
    near = np.array([[5, 6, 7], [5, 6, 7]])
    far = near + [[0], [beyond - 5]]
    np.testing.assert_allclose(attend(q, k, v, near)[0], attend(q, k, v, far)[0], rtol=0, atol=atol)


BORDERS = [5, SMALL - 1, 3 * SMALL - 8]


@pytest.mark.parametrize(
    "position, capacity",
    [
        (0, 3 * SMALL - 7),
        (SMALL, 3 * SMALL - 7),
        (LARGE - 1, LARGE + 3 * SMALL - 7),
        (2 * LARGE * 7 // 8, 2 * LARGE),  # where blocks end
        *long(
            *((at, 3 * SMALL - 7) for at in BORDERS),
            *((at + LARGE, LARGE + 3 * SMALL - 7) for at in (-SMALL, 0, SMALL, *BORDERS)),
            *((2 * LARGE - 1, 2 * LARGE), (LARGE - 2, LARGE), (99, 100)),
            *((2 * LARGE * 7 // 8 + at, 2 * LARGE) for at in (-1, 9)),
        ),
    ],
)
def test_blocks_of_the_cache_equal_plain_attention(position, capacity):
    """At every border of the blocks, and in the last block of a capacity that is no multiple."""
    q, k, v = normal((1, 1, 4, 16), *[(1, 2, capacity, 16)] * 2)
    mask = np.arange(capacity)[None, None] <= position
    plain = jax.jit(attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    # What lies behind the last query may be anything that is a number.
    v[:, :, position + 1 :] = 1e30
    found = jax.jit(cached_attention)(q, k, v, np.array([[position]]))
    np.testing.assert_allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize("window", [1, SMALL + 9, *long(40, LARGE + 3)])
@pytest.mark.parametrize("position", [0, SMALL + 10, 2 * LARGE - 70, *long(39, LARGE + 2)])
def test_a_window_of_the_cache_equals_plain_attention(position, window):
    """Rows of two lengths; blocks before both windows are not read."""
    capacity = 2 * LARGE
    q, k, v = normal((2, 2, 4, 16), *[(2, 2, capacity, 16)] * 2)
    positions_BT = np.array([[position], [position + 60]]) + np.arange(2)
    back = positions_BT[:, :, None] - np.arange(capacity)
    seen = (back >= 0) & (back < window)
    plain = jax.jit(attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    unseen = (position - window + 1) // LARGE * LARGE
    k[:, :, : max(unseen, 0)] = np.nan
    found = jax.jit(cached_attention, static_argnums=4)(q, k, v, positions_BT, window)
    np.testing.assert_allclose(found, plain, atol=1e-6)


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


@pytest.mark.parametrize("batch", [1, 3, platforms.TUNINGS["cpu"].unrolled_writes + 1])
def test_writes_land_at_each_row_s_position(batch):
    """Both ways of writing, up to the last slot."""
    capacity, steps = 16, 3
    cache, new = normal((batch, 2, capacity, 4), (batch, steps, 2, 4))
    start = np.arange(batch) % (capacity - steps) + 1
    expected = cache.copy()
    for row in range(batch):
        expected[row, :, start[row] : start[row] + steps] = new[row].swapaxes(0, 1)
    found = jax.jit(write, static_argnums=3)(cache, new.swapaxes(1, 2), start, 2)
    np.testing.assert_array_equal(found, expected)


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


@pytest.mark.parametrize("window", [None, *long(1, 2, 7)])
@pytest.mark.parametrize("steps, heads", [(1, 4), (3, 4), (1, 2)])
def test_attention_before_the_cache_is_written(monkeypatch, steps, heads, window):
    """An empty row, one that fills its cache, and one between; stale slots are not seen."""
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    shapes = (3, steps, heads, 8), *[(3, 2, steps, 8)] * 2, *[(3, 2, 40, 8)] * 2
    q, k, v, keys, values = normal(*shapes)

    @jax.jit
    def both(q, k, v, keys, values, start_B):
        written = (write(*pair, start_B, 2) for pair in ((keys, k), (values, v)))
        positions_BT = start_B[:, None] + jnp.arange(steps)
        after = cached_attention(q, *written, positions_BT, window)
        return attention_before_writing(q, k, v, keys, values, start_B, window), after

    start_B = np.array([0, 40 - steps, 23])
    found, expected = both(q, k, v, keys, values, start_B)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    stale = (np.arange(40) >= start_B[:, None])[:, None, :, None]
    caches = (np.where(stale, 1e9, cache).astype(np.float32) for cache in (keys, values))
    np.testing.assert_array_equal(both(q, k, v, *caches, start_B)[0], found)


@pytest.mark.parametrize("steps", [1, 3])
def test_attention_to_a_cache_on_accelerators(monkeypatch, steps):
    """The same numbers as on CPUs, without a loop or a branch in the lowered program."""
    q, k, v = normal((2, steps, 4, 8), *[(2, 2, 600, 8)] * 2)
    positions_BT = np.array([[5], [411]]) + np.arange(steps)
    expected = jax.jit(cached_attention)(q, k, v, positions_BT)
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    lowered = jax.jit(lambda *arrays: cached_attention(*arrays)).lower(q, k, v, positions_BT)
    np.testing.assert_allclose(lowered.compile()(q, k, v, positions_BT), expected, atol=1e-6)
    monkeypatch.setattr("lsjax.model.cached_attention.MOST_SCORES", 600 * steps - 1)
    in_blocks = jax.jit(lambda *arrays: cached_attention(*arrays))
    np.testing.assert_allclose(in_blocks(q, k, v, positions_BT), expected, atol=1e-6)
    text = lowered.as_text()
    assert "stablehlo.while" not in text and "stablehlo.case" not in text


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
