"""Greedy self-speculation gives the tokens of autoregressive decoding, whatever E, d and batch."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 17]
NEW = 24
# Where two computations differ in rounding, a tie of this size may fall either way.
MARGIN = 1e-4


def assert_same_tokens(model, prompt, expected, found):
    """Fails on a difference unless the two best logits there lie closer than MARGIN."""
    if expected == found:
        return
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    assert place is not None, f"{len(expected)} and {len(found)} tokens"
    logits = model(jnp.asarray([list(prompt) + expected[:place]]))[0, -1]
    second, first = np.sort(np.asarray(logits))[-2:]
    assert first - second < MARGIN, f"token {place} differs with a margin of {first - second}"


def tokens(model, tokenizer, strategy, prompts, batch_size=1, **options):
    engine = Engine(model, tokenizer, strategy, batch_size=batch_size)
    return [c.token_ids for c in engine.generate(prompts, max_new_tokens=NEW, **options)]


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return tokens(model, tokenizer, Autoregressive(), PROMPTS)


def test_autoregressive_equals_the_full_forward(model, expected):
    """Without a cache: the best next token of every prefix."""
    forward = jax.jit(lambda model, tokens: model(tokens).argmax(-1))
    for prompt, new in zip(PROMPTS, expected, strict=True):
        best = np.asarray(forward(model, jnp.asarray([prompt + new])))[0]
        assert_same_tokens(model, prompt, best[len(prompt) - 1 : -1].tolist(), new)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_early_exit_equals_the_truncated_forward(model, tokenizer, exit_layer):
    forward = jax.jit(lambda model, tokens: model.unembed(model.exits(tokens)[exit_layer - 1]))
    found = tokens(model, tokenizer, EarlyExit(exit_layer), PROMPTS[:2])
    for prompt, new in zip(PROMPTS, found, strict=False):
        logits = np.asarray(forward(model, jnp.asarray([prompt + new])))[0]
        chosen = np.take_along_axis(logits[len(prompt) - 1 : -1], np.array(new)[:, None], 1)[:, 0]
        assert (logits[len(prompt) - 1 : -1].max(-1) - chosen < MARGIN).all()


@pytest.mark.parametrize("drafts", range(1, 9))
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_self_speculation_is_lossless(model, tokenizer, expected, exit_layer, drafts):
    """Four ragged prompts side by side: each gives what it gives alone."""
    found = tokens(model, tokenizer, SelfSpeculative(exit_layer, drafts), PROMPTS, batch_size=4)
    for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(model, prompt, one, other)


def test_drafts_are_accepted_and_refused(model, tokenizer):
    """Else the test above would say nothing."""
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4), batch_size=4)
    completions = engine.generate(PROMPTS, max_new_tokens=NEW)
    accepted = sum(c.accepted for c in completions)
    assert 0.1 < accepted / sum(c.drafted for c in completions) < 0.9


def test_a_draft_by_the_whole_model_is_always_right(model, tokenizer, expected):
    """Layers that add nothing behind the exit: every draft is accepted, nothing is overshot."""
    cut = jax.tree.map(lambda leaf: leaf, model)
    for block in list(cut.layers)[2:]:
        block.attention.out.kernel = jnp.zeros_like(block.attention.out.kernel[...])
        block.feed_forward.down.kernel = jnp.zeros_like(block.feed_forward.down.kernel[...])
    for drafts in (1, 4, 7):
        engine = Engine(cut, tokenizer, SelfSpeculative(2, drafts))
        (completion,) = engine.generate([[5, 6]], max_new_tokens=NEW)
        assert completion.acceptance_rate == 1.0
        assert completion.num_new_tokens == NEW
        # The prefill gives one token, a round drafts + 1, and the last round drafts what is left.
        assert completion.rounds == -(-(NEW - 1) // (drafts + 1))
        assert completion.drafted == NEW - 1 - completion.rounds


def test_end_token_inside_a_draft(model, tokenizer, expected):
    """Any token of the expected text may be the end: the text stops at its first occurrence."""
    inside = 0
    for prompt, new in list(zip(PROMPTS, expected, strict=True))[1:3]:
        for end in sorted(set(new)):
            ending = copy.copy(tokenizer)
            ending.eos_ids = (end,)
            engine = Engine(model, ending, SelfSpeculative(3, 5))
            (completion,) = engine.generate([prompt], max_new_tokens=NEW)
            assert completion.token_ids == new[: new.index(end) + 1]
            assert completion.finish_reason == "eos"
            assert completion.drafted <= completion.num_new_tokens + 5 * completion.rounds
            inside += bool(completion.trace.accepted_n[-1])
    assert inside, "no end token was an accepted draft"


def test_max_new_tokens_1_needs_no_round(model, tokenizer, expected):
    engine = Engine(model, tokenizer, SelfSpeculative(1, 4), batch_size=2)
    completions = engine.generate(PROMPTS, max_new_tokens=1)
    assert [c.token_ids for c in completions] == [new[:1] for new in expected]
    assert all(c.rounds == 0 and c.tokens_per_second is None for c in completions)
    assert all(c.acceptance_rate is None and c.tokens_per_round is None for c in completions)


@pytest.mark.parametrize(
    "strategy, words",
    [
        (SelfSpeculative(0, 4), "exit layer 0 is not in 1..3"),
        (SelfSpeculative(4, 4), "exit layer 4 is not in 1..3"),
        (SelfSpeculative(2, 0), "num_draft_tokens 0"),
        (EarlyExit(0), "exit layer 0 is not in 1..4"),
        (EarlyExit(5), "exit layer 5 is not in 1..4"),
    ],
)
def test_bad_strategies_are_refused(model, tokenizer, strategy, words):
    with pytest.raises(ConfigError, match=words):
        Engine(model, tokenizer, strategy)
