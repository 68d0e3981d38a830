"""Tokens and log-probabilities of rollouts, against autoregressive ones and full forward passes.

    python scripts/grpo_study.py --output build/evidence/grpo
    python scripts/rollout_check.py --model build/evidence/grpo/policy

Greedy texts must equal autoregressive ones. Log-probabilities of sampled ones must be those of one
forward pass within 1e-4, before the temperature and after it. The texts of a large group must have
the policy's distribution, by a chi-squared test. All in float32. Exits with 1 otherwise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from grpo_study import EXITS, NEW, sums
from scipy.stats import chisquare

import lsjax
from lsjax.cli.setup import exact_products

LIMIT = 1e-4
REJECTED = 0.001  # p-value


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    model: Path
    """Run of a policy that adds numbers."""
    rollouts: int = 200
    """Texts."""
    temperature: float = 0.8
    """Of the sampled texts."""
    group: int = 4_096
    """Texts of one prompt, whose distribution is tested."""


def main(arguments: Arguments) -> int:
    """Prints what was equal, and the largest difference."""
    exact_products()
    policy, tokenizer = lsjax.load(arguments.model), lsjax.load_tokenizer(arguments.model)
    strategies = lsjax.Autoregressive(), lsjax.Adaptive(EXITS)
    engines = [lsjax.Rollouts(policy, tokenizer, one, batch_size=16) for one in strategies]
    asked = sums(3)
    prompts = [next(asked)[0] for _ in range(arguments.rollouts)]
    options = dict(max_new_tokens=NEW, sampling=lsjax.Sampling(temperature=0.0))
    plain, drafted = (engine.generate(prompts, **options) for engine in engines)
    equal = sum(
        one.token_ids == two.token_ids
        for one, two in zip(plain.completions, drafted.completions, strict=True)
    )
    print(f"{equal} of {len(prompts)} greedy texts equal autoregressive ones")
    good = equal == len(prompts)
    sampling = lsjax.Sampling(temperature=arguments.temperature, seed=7)
    for after in (False, True):
        batch = engines[1].generate(
            prompts, max_new_tokens=NEW, sampling=sampling, sampled_log_probs=after
        )
        temperature = arguments.temperature if after else 1.0
        expected_RT = lsjax.token_log_probs(policy, *batch.arrays, temperature=temperature)
        difference = float(np.abs(expected_RT - batch.log_probs_RT).max())
        when = "after" if after else "before"
        print(
            f"{int(batch.mask_RT.sum()):,} log-probabilities {when} the temperature: largest "
            f"difference {difference:.1e}"
        )
        good &= difference <= LIMIT
    for prompt in prompts[:3]:
        p_value, classes = distribution(engines[1], prompt, arguments.group)
        print(f"{arguments.group} texts of {prompt!r} in {classes} classes: p-value {p_value:.3f}")
        good &= p_value > REJECTED
    return int(not good)


def distribution(rollouts: lsjax.Rollouts, prompt: str, group: int) -> tuple[float, int]:
    """p-value of the texts of a group, and its classes: each text that is expected at least five
    times, and the others together."""
    batch = rollouts.generate([prompt], group_size=group, max_new_tokens=NEW)
    _, rows, counts = np.unique(batch.texts, return_index=True, return_counts=True)
    arrays = (array[rows] for array in batch.arrays)
    log_probs_RT = np.asarray(lsjax.token_log_probs(rollouts.engine.model, *arrays), np.float64)
    expected = group * np.exp(log_probs_RT.sum(1))
    often = expected >= 5
    seen, expected = (
        np.append(values[often], group - values[often].sum()) for values in (counts, expected)
    )
    return chisquare(seen, expected).pvalue, len(seen)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
