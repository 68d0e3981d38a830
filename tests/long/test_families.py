"""Decoding and gradients of the other families. Long: each of them has programs of its own."""

import pytest

from tests.families.test_decoding import assert_lossless
from tests.families.test_training import assert_same_gradients

OTHERS = ("mistral", "qwen2", "qwen3", "smollm3", "olmo2")


@pytest.mark.parametrize("name", OTHERS)
def test_self_speculation_is_lossless(name, small_tokenizer):
    assert_lossless(name, small_tokenizer)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_are_those_of_separate_layers(name):
    assert_same_gradients(name)
