"""States and probabilities of exits at each new token, against a pass without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.decoding import prompts, runtime
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit

PROMPTS, LONGEST = ([1, 2, 3], [9] * 20, [7]), 64


@pytest.fixture(scope="module")
def passes(model):
    """Each exit's states and log-probabilities along a text, padded to LONGEST tokens."""

    @jax.jit
    def run(ids_1T):
        states_LTD = model.exits(ids_1T)[:, 0]
        return states_LTD, jax.nn.log_softmax(model.unembed(states_LTD))

    return lambda ids: run(jnp.asarray([ids + [0] * (LONGEST - len(ids))]))


def check(passes, completion, prompt, exits):
    """The outputs that belong to the new tokens of a completion."""
    states_LTD, log_p_LTV = passes([*prompt, *completion.token_ids])
    at = slice(len(prompt) - 1, len(prompt) - 1 + len(completion.token_ids))
    assert completion.exits.keys() == {*exits}
    for exit_layer, found in completion.exits.items():
        log_p_nV = np.asarray(log_p_LTV[exit_layer - 1, at])
        np.testing.assert_allclose(found.hidden_nD, states_LTD[exit_layer - 1, at], atol=1e-4)
        np.testing.assert_allclose(found.top_probs_n, np.exp(log_p_nV.max(-1)), rtol=1e-4)
        chosen_n = log_p_nV[np.arange(len(log_p_nV)), completion.token_ids]
        np.testing.assert_allclose(found.log_probs_n, chosen_n, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy, exits",
    [
        (SelfSpeculative(1, 4), (2, 1)),
        (Autoregressive(), (1,)),
        (EarlyExit(1), (1,)),
        (Adaptive((1,), lengths=(0, 2), seconds=((1.0,) * 2,) * 2), (1, 2)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_outputs_are_those_of_a_whole_pass(model, tokenizer, passes, strategy, exits, monkeypatch):
    """In chunks of 8, for rows that are refilled, that end in turn and outgrow their cache."""
    monkeypatch.setattr(prompts, "PREFILL_CHUNKS", (8,))
    monkeypatch.setattr(runtime, "MIN_CAPACITY", 16)
    monkeypatch.setattr(runtime, "SLACK", 16)
    engine = Engine(model, tokenizer, strategy, batch_size=2, ignore_end=True)
    new = (21, 3, 16)
    requests = [
        Request(prompt=prompt, max_new_tokens=count, exits=exits)
        for prompt, count in zip(PROMPTS, new, strict=True)
    ]
    found = engine.generate([*requests, Request(prompt=[5], max_new_tokens=3)])
    for prompt, completion, count in zip(PROMPTS, found, new, strict=False):
        assert completion.num_new_tokens == count
        check(passes, completion, prompt, exits)
    assert found[-1].exits == {}
    assert "exits" not in found[0].to_json()


def test_outputs_end_with_the_text(model, tokenizer, passes):
    """At a stop string, in a conversation whose cache goes on, with a sampled text."""
    engine = Engine(model, tokenizer, SelfSpeculative(1, 4), ignore_end=True)
    (whole,) = engine.generate([[1, 2, 3]], max_new_tokens=20)
    stop = whole.text[4:7]
    (cut,) = engine.generate([[1, 2, 3]], max_new_tokens=20, stop=(stop,), exits=(1,))
    assert 0 < len(cut.exits[1].log_probs_n) == cut.num_new_tokens < 20
    check(passes, cut, [1, 2, 3], (1,))


def test_exits_that_do_not_run_are_refused(model, tokenizer):
    engine = Engine(model, tokenizer, EarlyExit(1))
    with pytest.raises(
        ConfigError, match=r"exits \[2\] of a request .*: early_exit runs 1 layers, so use 1..1"
    ):
        engine.generate([[1]], exits=(2,))
    with pytest.raises(ConfigError, match=r"exits \(0,\) must be .* at least 1"):
        engine.generate([[1]], exits=(0,))
