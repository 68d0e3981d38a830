"""Gradients of a step in bfloat16: sums over many tokens are in float32."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.config import LlamaConfig, StepConfig
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves
from lsjax.training.recipe import PAPER
from lsjax.training.step import init_state, loss_and_gradients

ROWS, STEPS, VOCAB, WIDTH = 64, 512, 512, 32
CONFIG = StepConfig(num_steps=10, dtype="bfloat16")
SHAPE = LlamaConfig.tiny(
    num_layers=2,
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_context=STEPS,
    tie_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: init_state(CONFIG, Llama(SHAPE, rngs=nnx.Rngs(0))))()


@pytest.fixture(scope="module")
def batch():
    """32,768 tokens, the most frequent of them 15% of all (Zipf's law)."""
    frequency = 1 / np.arange(1, VOCAB + 1)
    rng = np.random.default_rng(0)
    tokens = rng.choice(VOCAB, (ROWS, STEPS + 1), p=frequency / frequency.sum()).astype(np.int32)
    return dict(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        segments_BT=np.ones((ROWS, STEPS), np.int32),
        positions_BT=np.broadcast_to(np.arange(STEPS, dtype=np.int32), (ROWS, STEPS)),
    )


def lowered(config, state, batch):
    return jax.jit(
        lambda state, batch: loss_and_gradients(config, PAPER, state, batch, ROWS * STEPS)[1]
    ).lower(state, batch)


@pytest.mark.long
def test_gradients_are_those_of_float32(state, batch):
    exact, found = (
        named_leaves(
            lowered(dataclasses.replace(CONFIG, dtype=dtype), state, batch).compile()(state, batch)
        )
        for dtype in ("float32", "bfloat16")
    )
    assert len(exact) == 13
    for name, gradient in exact.items():
        assert found[name].dtype == np.float32
        error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.02, f"{name}: {error:.3f}"


def test_no_long_sum_is_in_bfloat16(state, batch):
    """Checks the scatters and the sums of the lowered step."""
    text = lowered(CONFIG, state, batch).as_text()
    scatters = re.findall(r"stablehlo\.scatter.*?\}\) : \((.*?)\)", text, re.DOTALL)
    assert len(scatters) > 0
    assert not [types for types in scatters if "bf16" in types]
    sums = re.findall(r"stablehlo\.reduce\(.*?across dimensions = .*? : \((tensor<[^>]*>)", text)
    assert len([types for types in sums if types.endswith("f32>")]) > 5
    assert not [types for types in sums if types.endswith("bf16>")]
