"""Rollouts: shapes, seeds, and log-probabilities against plain forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lsjax
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.model.llama import stacked, unstacked
from lsjax.rollouts.engine import Rollouts, padded
from lsjax.rollouts.log_probs import rollout_exit_loss, token_log_probs
from tests.marks import long

PROMPTS = ["hello", [1, 2, 3]]
WARM = lsjax.Sampling(temperature=0.7, seed=5)


def policy(seed: int) -> lsjax.Llama:
    config = lsjax.LlamaConfig.tiny(num_layers=3)
    return unstacked(jax.jit(lambda: lsjax.Llama(config, rngs=nnx.Rngs(seed)))())


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return Rollouts(policy(0), ByteTokenizer(), lsjax.Autoregressive(), batch_size=2, pad_id=9)


@pytest.fixture(scope="module")
def batch(rollouts):
    return rollouts.generate(PROMPTS, group_size=3, max_new_tokens=12, sampling=WARM)


def test_padding():
    found, mask = padded([[1], [2, 3, 4]], 0, left=True)
    np.testing.assert_array_equal(found, [[0, 0, 1], [2, 3, 4]])
    np.testing.assert_array_equal(mask, [[False, False, True], [True, True, True]])
    found, mask = padded([[1], [2, 3]], 7)
    np.testing.assert_array_equal(found, [[1, 7], [2, 3]])
    np.testing.assert_array_equal(mask, [[True, False], [True, True]])


def test_groups(batch):
    """Rows of a group have their prompt, and texts and seeds of their own."""
    ids = ByteTokenizer().encode("hello")
    assert batch.prompts_RP.shape == (6, len(ids))
    for row in range(3):
        assert batch.prompts_RP[row].tolist() == ids
        assert batch.prompts_RP[3 + row].tolist() == [9] * (len(ids) - 3) + [1, 2, 3]
        assert batch.prompt_mask_RP[3 + row].sum() == 3
    assert [one.seed for one in batch.completions] == [5, 6, 7, 8, 9, 10]
    assert len({*batch.texts}) == 6
    for row, one in enumerate(batch.completions):
        assert batch.tokens_RT[row, batch.mask_RT[row]].tolist() == one.token_ids
        assert (batch.tokens_RT[row, ~batch.mask_RT[row]] == 9).all()
        assert (batch.log_probs_RT[row, ~batch.mask_RT[row]] == 0).all()


@pytest.mark.parametrize("sampled", [True, *long(False)])
def test_log_probs_are_those_of_a_forward_pass(rollouts, sampled):
    """After the temperature, and before it. The reference has all logits of each text alone."""
    given = dict(group_size=2, max_new_tokens=12, sampling=WARM)
    batch = rollouts.generate(PROMPTS, sampled_log_probs=sampled, **given)
    model, temperature = rollouts.engine.model, 0.7 if sampled else 1.0
    found_RT = token_log_probs(model, *batch.arrays, temperature=temperature)
    np.testing.assert_allclose(found_RT, batch.log_probs_RT, atol=1e-4)
    for row, one in enumerate(batch.completions):
        prompt = batch.prompts_RP[row][batch.prompt_mask_RP[row]].tolist()
        logits = model(jnp.array([prompt + one.token_ids]))[0, len(prompt) - 1 : -1]
        logs = jax.nn.log_softmax(logits / temperature)
        expected = np.take_along_axis(logs, np.array(one.token_ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(one.log_probs, expected, atol=1e-4)


@pytest.mark.long
def test_gradients_are_those_of_plain_logits(batch):
    model = stacked(policy(0))
    prompt = batch.prompts_RP.shape[1]

    def ours(model):
        return token_log_probs(model, *batch.arrays)[:3].sum()  # rows without padding in the prompt

    def plain(model):
        tokens = jnp.concatenate([batch.prompts_RP, batch.tokens_RT], 1)[:3]
        logs = jax.nn.log_softmax(model(tokens)[:, prompt - 1 : -1])
        own = jnp.take_along_axis(logs, batch.tokens_RT[:3, :, None], 2)[..., 0]
        return jnp.where(batch.mask_RT[:3], own, 0).sum()

    found, expected = (jax.jit(jax.grad(one))(model) for one in (ours, plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )


@pytest.mark.long
def test_the_loss_of_exits_is_that_of_all_logits(batch):
    """KL(last exit || exit 1) over the new tokens. The last exit gets no gradient."""
    model = stacked(policy(0))
    rows, prompt = slice(0, 3), batch.prompts_RP.shape[1]
    some = [field[rows] for field in batch.arrays]
    found, gradient = jax.jit(jax.value_and_grad(lambda m: rollout_exit_loss(m, [1], *some)))(model)
    states = unstacked(model).exits(jnp.concatenate([some[0], some[2]], 1))
    log_q, log_p = (
        jax.nn.log_softmax(model.unembed(states[at]))[:, prompt - 1 : -1] for at in (0, -1)
    )
    each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(found, each[some[3]].mean(), rtol=1e-4)
    own = np.asarray(gradient.layers.attention.out.kernel[...])
    assert np.abs(own[0]).max() > 0 and np.abs(own[1:]).max() == 0
    with pytest.raises(lsjax.ConfigError, match="exit 3 is out of range"):
        rollout_exit_loss(model, [3], *some)


@pytest.mark.long
def test_new_weights_need_no_new_program():
    """Greedy texts are those of autoregressive decoding with the new weights."""
    other, drafts = policy(1), lsjax.Adaptive((1,))
    rollouts = Rollouts(policy(0), ByteTokenizer(), drafts, batch_size=2)
    greedy = dict(max_new_tokens=10, sampling=lsjax.Sampling(temperature=0.0))
    before = rollouts.generate(PROMPTS, **greedy)
    compiled = rollouts.engine.programs.compile_seconds
    rollouts.use(other)
    found = rollouts.generate(PROMPTS, **greedy)
    assert rollouts.engine.programs.compile_seconds == compiled
    plain = lsjax.Engine(other, ByteTokenizer()).generate(PROMPTS, max_new_tokens=10)
    assert found.texts == [one.text for one in plain] != before.texts


def test_bad_input(rollouts):
    with pytest.raises(lsjax.ConfigError, match="group_size 0"):
        rollouts.generate(PROMPTS, group_size=0)
    with pytest.raises(lsjax.ConfigError, match="there are no prompts"):
        rollouts.generate([])
    requests = [lsjax.Request(prompt=[1], sampled_log_probs=one) for one in (True, False)]
    with pytest.raises(lsjax.ConfigError, match="must agree on sampled_log_probs"):
        rollouts.engine.generate(requests)
