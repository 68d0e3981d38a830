"""GRPO with Tunix on sums, with lsjax's rollouts. The policy is one of scripts/grpo_study.py.

    make test-extras   # installs Tunix
    python scripts/grpo_study.py --output build/evidence/grpo
    python scripts/grpo_tunix.py --model build/evidence/grpo/policy --steps 100

--engine autoregressive drafts nothing, for comparison.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import grain
import jax
import numpy as np
import optax
import tyro
from grpo_study import EXITS, NEW, reward, sums
from jax.sharding import Mesh
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

import lsjax
from lsjax.rollouts.tunix import Actor, LayerSkipRollout, TunixTokenizer


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    model: Path
    """Run of the policy."""
    steps: int = 100
    """Steps of GRPO."""
    engine: Literal["layerskip", "autoregressive"] = "layerskip"
    """Rollouts that draft with the exits, or not."""


def main(arguments: Arguments) -> None:
    """Prints the mean reward of each step."""
    tokenizer, devices = lsjax.load_tokenizer(arguments.model), np.array(jax.devices())
    mesh = Mesh(devices.reshape(-1, 1), ("fsdp", "tp"))
    drafts = lsjax.Adaptive(EXITS) if arguments.engine == "layerskip" else lsjax.Autoregressive()
    config = ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT), mesh),
        rollout_engine=partial(LayerSkipRollout, text=tokenizer, strategy=drafts, batch_size=16),
        training_config=RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)),
            eval_every_n_steps=10**6,
            max_steps=arguments.steps,
            mini_batch_size=8,
            train_micro_batch_size=8,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=NEW, max_prompt_length=16, temperature=1.0, return_logprobs=True
        ),
    )
    actor, text = Actor(lsjax.load(arguments.model)), TunixTokenizer(tokenizer)
    cluster = RLCluster(actor=actor, tokenizer=text, cluster_config=config)
    began = time.perf_counter()

    def right(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        found = [reward(*pair) for pair in zip(prompts, completions, strict=True)]
        seconds = time.perf_counter() - began
        print(f"after {seconds:.1f} s: reward {np.mean(found):.3f}", flush=True)
        return found

    settings = GRPOConfig(num_generations=8, num_iterations=1, beta=0.0)
    learner = GRPOLearner(rl_cluster=cluster, reward_fns=right, algo_config=settings)
    asked = sums(2)
    prompts = [next(asked)[0] for _ in range(8 * arguments.steps)]
    learner.train(grain.MapDataset.source(prompts).batch(8).map(lambda some: {"prompts": some}))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
