"""Tunix takes our rollouts: its cluster, its log-probabilities, and GRPO. Needs the extra tunix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import lsjax
from lsjax.data.tokenizer_backends import ByteTokenizer

pytest.importorskip("tunix", reason="needs the extra tunix")
grain = pytest.importorskip("grain")

from tunix.rl import common, rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout.base_rollout import RolloutConfig  # noqa: E402

from lsjax.rollouts.tunix import Actor, LayerSkipRollout, TunixTokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Tunix
TOKENIZER = ByteTokenizer()
ROLES = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT


def actor(seed: int = 0) -> Actor:
    config = lsjax.LlamaConfig.tiny(num_layers=2)
    return Actor(jax.jit(lambda: lsjax.Llama(config, rngs=nnx.Rngs(seed)))())


def cluster_of(policy: Actor, steps: int, strategy=None) -> rl_cluster.RLCluster:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(ROLES, mesh),
        rollout_engine=partial(
            LayerSkipRollout,
            text=TOKENIZER,
            strategy=strategy or lsjax.Adaptive((1,)),
            batch_size=4,
        ),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adam(3e-3),
            eval_every_n_steps=1000,
            max_steps=steps,
            mini_batch_size=2,
            train_micro_batch_size=2,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=8, max_prompt_length=8, temperature=0.8, return_logprobs=True
        ),
    )
    return rl_cluster.RLCluster(
        actor=policy,
        reference=actor(),
        tokenizer=TunixTokenizer(TOKENIZER),
        cluster_config=config,
    )


@pytest.fixture(scope="module")
def output():
    policy = actor()
    cluster = cluster_of(policy, 1)
    return policy, cluster, cluster.generate(["hello", "abc", "hello"])


def test_a_rollout(output):
    """Padded prompts, tokens without padding, and their texts."""
    _, _, found = output
    assert found.left_padded_prompt_tokens.shape == (3, 8)
    for prompt, row in zip(("hello", "abc", "hello"), found.left_padded_prompt_tokens, strict=True):
        assert row[row != 0].tolist() == TOKENIZER.encode(prompt)
    assert found.text[0] != found.text[2], "each text has a seed of its own"
    for text, tokens, logs in zip(found.text, found.tokens, found.logprobs, strict=True):
        assert TOKENIZER.decode([int(t) for t in tokens if t not in TOKENIZER.eos_ids]) == text
        assert len(tokens) == len(logs) and (logs < 0).all()


def test_log_probs_are_those_of_tunix(output):
    """Tunix computes them with the actor, at the temperature of the rollout and at 1."""
    policy, cluster, found = output
    tokens = np.zeros((3, 8), np.int32)
    logs, mask = np.zeros((3, 8), np.float32), np.zeros((3, 8), bool)
    for row, (own, values) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        tokens[row, : len(own)], logs[row, : len(own)], mask[row, : len(own)] = own, values, True
    graph, state = nnx.split(policy)
    given = dict(pad_id=0, eos_id=TOKENIZER.eos_ids[0])
    prompts = jnp.asarray(found.left_padded_prompt_tokens)
    theirs = partial(
        common.compute_per_token_logps, graph, state, prompts, jnp.asarray(tokens), **given
    )
    np.testing.assert_allclose(
        np.where(mask, theirs(temperature=0.8), 0), np.where(mask, logs, 0), atol=1e-4
    )
    ours = cluster.rollout.get_per_token_logps(prompts, jnp.asarray(tokens))
    np.testing.assert_allclose(np.where(mask, theirs(), 0), np.where(mask, ours, 0), atol=1e-4)


@pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), lsjax.Adaptive((1,))])
def test_grpo_raises_the_reward(strategy):
    """Texts are rewarded for vowels. The policy's arrays change, and the rollouts use these."""
    policy, rewards = actor(), []
    before = jax.tree.map(jnp.copy, nnx.state(policy))
    cluster = cluster_of(policy, 12, strategy)

    def vowels(prompts, completions, **_):
        found = [sum(letter in "aeiou" for letter in text) for text in completions]
        rewards.append(float(np.mean(found)))
        return [float(one) for one in found]

    settings = grpo_learner.GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=vowels, algo_config=settings)
    data = grain.MapDataset.source(["hello", "abc"] * 20).batch(2)
    learner.train(data.map(lambda prompts: {"prompts": prompts}))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), before, nnx.state(cluster.actor_trainer.model)
    )
    assert all(jax.tree.leaves(changed))
    assert cluster.rollout.model() is cluster.actor_trainer.model
