"""The kernel that decodes on NVIDIA GPUs, interpreted, against plain writes and reads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax import platforms
from lsjax.config import LlamaConfig
from lsjax.kernels import cached_attention, flash_prefill
from lsjax.kernels.cache_blocks import attend_to_used_slots
from lsjax.kernels.cache_writes import write
from lsjax.kernels.flash_decoding import BLOCK, MOST_STEPS, fits, flash_decoding
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama
from tests.marks import long

# Heads, K/V heads, head size, slots, new tokens, and where they begin in each row.
CASES = {
    "an empty cache": (4, 2, 16, 320, 1, [0]),
    "whole blocks": (4, 2, 32, 320, 5, [64, 256]),
    "rows of all lengths": (4, 1, 64, 320, 3, [0, 1, 63, 65, 200]),
    "the end of the cache": (2, 2, 128, 128, 9, [119, 7]),
    "more parts than blocks in use": (8, 8, 16, 1088, MOST_STEPS, [70]),
}

SHORT = ("rows of all lengths", "the end of the cache")
SOME = [*SHORT[:1], *long(*(name for name in CASES if name not in SHORT[:1]))]


def arrays(name, dtype):
    heads, kv_heads, size, slots, steps, starts = CASES[name]
    rng, batch = np.random.default_rng(0), len(starts)
    shapes = [(batch, steps, n, size) for n in (heads, kv_heads, kv_heads)]
    shapes += [(batch, kv_heads, slots, size)] * 2
    made = [jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes]
    return *made, np.array(starts, np.int32)


@partial(jax.jit, static_argnames="window")
def plain(q, k, v, keys, values, start_B, window=None):
    keys = write(keys, k.swapaxes(1, 2), start_B, axis=2)
    values = write(values, v.swapaxes(1, 2), start_B, axis=2)
    positions_BT = start_B[:, None] + jnp.arange(q.shape[1])
    return attend_to_used_slots(q, keys, values, positions_BT, window), keys, values


@pytest.mark.parametrize("name", [*SHORT, *long(*(name for name in CASES if name not in SHORT))])
def test_attention_and_cache(name):
    given = arrays(name, jnp.float32)
    assert fits(given[0], given[3])
    (mixed, *caches), (expected, *filled) = flash_decoding(*given), plain(*given)
    np.testing.assert_allclose(mixed, expected, rtol=2e-5, atol=2e-6)
    for one, other in zip(caches, filled, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("window", [3, *long(130)])
@pytest.mark.parametrize("name", SOME)
def test_a_window_hides_what_lies_before_it(name, window):
    given = arrays(name, jnp.float32)
    mixed, expected = (f(*given, window=window)[0] for f in (flash_decoding, plain))
    np.testing.assert_allclose(mixed, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", SOME)
def test_bfloat16_is_as_near_as_plain_products(name):
    given = arrays(name, jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in given[:-1]), given[-1])
    mine, other = (
        np.abs(np.asarray(f(*given)[0], np.float32) - exact[0]).max()
        for f in (flash_decoding, plain)
    )
    assert mine <= max(1.25 * other, 1e-6)


def test_slots_behind_a_row_are_not_seen():
    q, k, v, keys, values, start_B = arrays("rows of all lengths", jnp.float32)
    stale = np.arange(keys.shape[2])[:, None] >= start_B[:, None, None, None]
    full = [np.where(stale, 1e6, x) for x in (keys, values)]
    np.testing.assert_array_equal(
        flash_decoding(q, k, v, *full, start_B)[0],
        flash_decoding(q, k, v, keys, values, start_B)[0],
    )


def test_a_row_that_has_ended_stays_within_the_cache():
    """Its tokens go nowhere else, whatever its length."""
    q, k, v, keys, values, _ = arrays("the end of the cache", jnp.float32)
    _, after, _ = flash_decoding(q, k, v, keys, values, np.array([keys.shape[2] - 2, 0], np.int32))
    np.testing.assert_array_equal(after[0, :, :-2], keys[0, :, :-2])
    np.testing.assert_array_equal(after[1, :, 9:], keys[1, :, 9:])


@pytest.mark.parametrize(
    "change, fit",
    [
        ({}, True),
        ({"steps": MOST_STEPS + 1}, False),
        ({"size": 80}, False),  # no power of two
        ({"heads": 32}, False),  # too many rows of a K/V head
        ({"slots": BLOCK + 1}, False),
    ],
)
def test_shapes_that_fit(change, fit):
    sizes = dict(steps=5, heads=4, size=64, slots=128) | change
    q = jnp.zeros((1, sizes["steps"], sizes["heads"], sizes["size"]))
    assert fits(q, jnp.zeros((1, 2, sizes["slots"], sizes["size"]))) == fit


@pytest.mark.long
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_model_as_accelerators_run_it(monkeypatch, platform):
    """A prompt, then few tokens at a time, rows of two lengths: the logits of whole sequences."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context=64,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(0), (2, 40), 0, 50)
    expected = model(tokens_BT)
    assert flash_prefill.platform() == "cpu"  # imported before, so that its kernel is interpreted
    monkeypatch.setattr(platforms, "platform", lambda: platform)
    if platform == "gpu":
        monkeypatch.setattr(cached_attention, "nvidia_capability", lambda: 9.0)
    jax.clear_caches()  # of layers that were traced for CPUs
    cache = KVCache.create(config, 2, BLOCK, jnp.float32)
    first_B = jnp.array([0, 0])
    run = jax.jit(lambda x, at, cache: model.run_layers(x, 0, 2, at, cache))
    for steps, back_B in ((32, [0, 3]), (1, [0, 0]), (3, [0, 0]), (1, [0, 0])):
        at_BT = first_B[:, None] + jnp.arange(steps)
        x_BTD, cache = run(model.embed(jnp.take_along_axis(tokens_BT, at_BT, 1)), at_BT, cache)
        found = model.unembed(x_BTD)
        wanted = jnp.take_along_axis(expected, at_BT[:, :, None], 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        first_B = first_B + steps - jnp.array(back_B)
    jax.clear_caches()
