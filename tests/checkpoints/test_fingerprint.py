"""Fingerprints: the sum that the module defines, and what changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.checkpoints.steps import fingerprint, fingerprints

M = 2**32


def by_hand(words: list[int]) -> int:
    """The definition with Python's whole numbers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % M
        x = (x ^ x >> 13) * 0xC2B2AE35 % M
        return x ^ x >> 16

    return sum(mix((word + 0x9E3779B9 * i) % M) for i, word in enumerate(words)) % M


@pytest.mark.parametrize(
    "array, unsigned",
    [
        (np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32), np.uint32),
        (np.arange(-7, 7, dtype=np.int32), np.uint32),
        (np.asarray(jnp.linspace(-3, 3, 12, dtype=jnp.bfloat16).reshape(4, 3)), np.uint16),
        (np.linspace(0, 1, 5).astype(np.float16), np.uint16),
        (np.arange(-3, 3, dtype=np.int8), np.uint8),
        (np.array([True, False, True]), np.uint8),
        (np.float32(1.5), np.uint32),
        (np.zeros((0, 3), np.float32), np.uint32),
    ],
)
def test_equals_the_definition(array, unsigned):
    words = np.ascontiguousarray(array).reshape(-1).view(unsigned).tolist()
    assert int(fingerprint(jnp.asarray(array))) == by_hand(words)


def test_float64():
    with jax.enable_x64(True):
        array = np.random.default_rng(0).normal(size=7)
        assert int(fingerprint(jnp.asarray(array))) == by_hand(array.view(np.uint32).tolist())


def test_every_bit_and_every_place_counts():
    array = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    seen = {int(fingerprint(jnp.asarray(array)))}
    for place in range(array.size):
        changed = array.copy()
        changed.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << place)
        seen.add(int(fingerprint(jnp.asarray(changed))))
    seen.add(int(fingerprint(jnp.asarray(array[::-1]))))
    assert len(seen) == array.size + 2


@pytest.mark.parametrize("value", [1.0, 0.02, -2.0])
def test_a_zeroed_page_of_equal_numbers_shows(value):
    """Where weights by position alone would cancel out: 1024 equal powers of two."""
    array = np.full((8, 1024), value, np.float32)
    before = fingerprints({"a": jnp.asarray(array)})
    for page in range(8):
        damaged = array.copy()
        damaged[page] = 0
        assert fingerprints({"a": jnp.asarray(damaged)}) != before


def test_eight_digits():
    assert fingerprints({"x": jnp.zeros(1, jnp.int32), "y": jnp.zeros(0)}) == {
        "x": "00000000",
        "y": "00000000",
    }
