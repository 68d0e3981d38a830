"""Sampled drafts of several exits. Long: these programs of `auto` are the largest."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import decode
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.state import DecodeState
from tests.decoding.test_adaptive import PROMPTS, adaptive, assert_seeds_repeat


def test_texts_of_a_seed_repeat(model, tokenizer):
    assert_seeds_repeat(Engine(model, tokenizer, batch_size=3), adaptive())


def test_counts_of_sampled_texts_are_finite(model):
    """Also if filters or a vocabulary give probability 0 to tokens."""
    strategy = adaptive(vocabulary=DraftVocabulary(np.arange(0, 258, 3)))
    sampling = Sampling(temperature=1.5, top_k=3, seed=4)
    state = DecodeState.create(
        model.config,
        [Request(prompt=prompt, max_new_tokens=60, sampling=sampling) for prompt in PROMPTS],
        capacity=128,
        num_layers=4,
        dtype=jnp.float32,
        learned=strategy.first_guess(len(PROMPTS)),
    )
    rounds = jax.jit(partial(decode, strategy=strategy))
    learned = rounds(model, state, np.int32(20), strategy.arguments(model)).learned
    for name, counts in dataclasses.asdict(learned).items():
        assert np.isfinite(counts).all(), name
    assert (learned.passed_BEC <= learned.tried_BEC).all() and (
        learned.tried_BEC.sum((1, 2)) > 9
    ).all()
    assert (learned.rounds_B == 20).all()
