"""Does acceptance last in reinforcement learning? GRPO on sums, with lsjax's rollouts.

    python scripts/grpo_study.py --output build/evidence/grpo

A small model learns with LayerSkip to add numbers one by one, from texts with many mistakes. So it
makes mistakes too. GRPO (Shao et al., 2024) then rewards right answers. Rollouts are
autoregressive or speculative, with the exits' loss as a term of the RL loss or without. A model
without LayerSkip drafts with exit blocks, which stay as they are while the model learns. The same
command resumes. Prints a table, and writes it for scripts/results.py, with a picture.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from evidence_list import TABLE

import lsjax
from lsjax.cli.setup import keep_compiled_programs
from lsjax.evaluation.intervals import Estimate, from_seeds
from lsjax.io.files import write_json
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table
from lsjax.rollouts.engine import RolloutBatch, Rollouts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXITS = (1, 2)
MISTAKES = 0.5  # share of the training's additions that are wrong
NEW = 32  # tokens of a text, at most
# The policy's training: the quickstart's recipe on a smaller shape and on sums.
TRAINING = """
    --config quickstart --model.vocab-size 258 --model.num-layers 8 --model.hidden-size 192
    --model.intermediate-size 512 --model.num-heads 3 --model.num-kv-heads 1
"""
WITHOUT = "--layer-dropout.p-max 0 --early-exit.curriculum none --early-exit.exits"
# Training of the models before GRPO, by the names of their runs.
MODELS = {
    "policy": f"{TRAINING} --early-exit.exits 1 2",
    "without": f"{TRAINING} {WITHOUT}",
    "blocks": "--config exit_blocks --init-from {folder}/without --exit-blocks.exits 1 2",
}
DATA = """
    --data.source jsonl --data.tokenizer bytes --data.prompt-template {{prompt}}
    --data.response-template {{text}} --data.paths {folder}/sums.jsonl --batch-size 16
    --seq-len 128 --num-steps {steps} --workdir {folder}/{name}
"""


class Variant(NamedTuple):
    """How the texts of a training are made, and what is trained."""

    strategy: lsjax.Autoregressive | lsjax.Adaptive = lsjax.Adaptive(EXITS)
    exit_weight: float = 0.0  # of the exits' loss
    model: str = "policy"


VARIANTS = {
    "autoregressive": Variant(lsjax.Autoregressive()),
    "speculative": Variant(),
    "speculative, exit loss 0.1": Variant(exit_weight=0.1),
    "speculative, exit blocks": Variant(model="blocks"),
}
REPEATED = ("autoregressive", "speculative")  # with each seed


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    output: Path
    """Folder of runs and figures."""
    pretraining: int = 500
    """Steps of the policy before GRPO."""
    steps: int = 200
    """Steps of GRPO."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds with and without speculation; others have the first alone."""
    prompts: int = 8
    """Sums of a step."""
    group: int = 8
    """Texts of each."""
    batch_size: int = 64
    """Rows that decode side by side."""
    learning_rate: float = 1e-4
    """Learning rate of Adam."""
    every: int = 20
    """Steps between two counts of acceptance."""


def sums(seed: int, mistakes: float = 0.0) -> Iterator[tuple[str, str]]:
    """Sums of three numbers below 20, added one by one, such as "5+19=24, 24+8=32". mistakes: share
    of additions that are one too many or too few."""
    draw = random.Random(seed)
    while True:
        numbers = [draw.randrange(1, 20) for _ in range(3)]
        total, steps = numbers[0], []
        for number in numbers[1:]:
            wrong = draw.choice((-1, 1)) if draw.random() < mistakes else 0
            steps.append(f"{total}+{number}={total + number + wrong}")
            total += number + wrong
        yield f"{'+'.join(map(str, numbers))}: ", f"{', '.join(steps)}\n"


def reward(prompt: str, text: str) -> float:
    """1 for the right total, 0 otherwise."""
    total = sum(map(int, prompt.removesuffix(": ").split("+")))
    return float(text.strip().rpartition("=")[2] == str(total))


def main(arguments: Arguments) -> int:
    """Trains what is missing, and prints the table. Returns the exit code of what failed."""
    keep_compiled_programs()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    pairs = sums(0, MISTAKES)
    rows = [dict(zip(("prompt", "text"), next(pairs), strict=True)) for _ in range(20_000)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, flags in MODELS.items():
        words = f"train {flags} {DATA}"
        words = words.format(folder=folder, steps=arguments.pretraining, name=name).split()
        code = subprocess.run([sys.executable, "-m", "lsjax", *words]).returncode
        if code:
            return code
    for seed in arguments.seeds:
        for name in VARIANTS if seed == arguments.seeds[0] else REPEATED:
            file = file_of(arguments, name, seed)
            if not file.exists():
                print(f"{name}, seed {seed}", flush=True)
                write_json(file, trained(arguments, name, seed))
    draw(arguments)
    lines = [*table(rows_of(arguments)), "", *table([("measured on", ""), *made_on().items()])]
    (folder / TABLE).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    return 0


def file_of(arguments: Arguments, name: str, seed: int) -> Path:
    """The figures of a training."""
    return arguments.output / f"{name.replace(',', '').replace(' ', '_')}-{seed}.json"


def trained(arguments: Arguments, name: str, seed: int) -> list[dict[str, Any]]:
    """A row of figures for each step of GRPO. Blocks get no gradient, so they stay."""
    (strategy, exit_weight, model), path = VARIANTS[name], arguments.output
    tokenizer = lsjax.load_tokenizer(path / "policy")
    policy = lsjax.stacked(lsjax.load(path / model))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(arguments.learning_rate))
    state, rows = optimizer.init(policy), []
    update = jax.jit(partial(updated, optimizer, exit_weight), donate_argnums=(0, 1))
    rollouts = Rollouts(
        lsjax.unstacked(policy), tokenizer, strategy, batch_size=arguments.batch_size
    )
    asked, others = sums(1_000 + seed), sums(1)
    counted = [next(others)[0] for _ in range(64)]
    for step in range(arguments.steps):
        prompts = [next(asked)[0] for _ in range(arguments.prompts)]
        rollouts.use(lsjax.unstacked(policy))
        began = time.perf_counter()
        batch = rollouts.generate(
            prompts,
            group_size=arguments.group,
            max_new_tokens=NEW,
            sampling=lsjax.Sampling(temperature=1.0, seed=(seed * 10_000 + step) * 4_096 % 2**32),
        )
        seconds = time.perf_counter() - began
        rewards = [
            reward(prompts[row // arguments.group], text) for row, text in enumerate(batch.texts)
        ]
        given = fields(batch), advantages(rewards, arguments.group)
        policy, state, loss = update(policy, state, *given)
        row = {"step": step, "reward": statistics.fmean(rewards), "seconds": seconds}
        row |= {"loss": float(loss), "tokens": int(batch.mask_RT.sum())}
        if step % arguments.every == 0 or step == arguments.steps - 1:
            given = lsjax.unstacked(policy), tokenizer, counted, EXITS, 4
            sampling = lsjax.Sampling(temperature=1.0, seed=1)
            found = lsjax.acceptance(*given, max_new_tokens=NEW, sampling=sampling)
            row["accepted"] = {e: float(r[0]) for e, r in zip(EXITS, found.rate_EJ, strict=True)}
        rows.append(row)
        if step % arguments.every == 0:
            print(row, flush=True)
    return rows


def fields(batch: RolloutBatch) -> tuple[np.ndarray, ...]:
    """Arrays of the loss, padded to few lengths, so that few programs are compiled."""
    more = -batch.tokens_RT.shape[1] % NEW, -batch.prompts_RP.shape[1] % 8
    right, left = ((0, 0), (0, more[0])), ((0, 0), (more[1], 0))
    prompts = np.pad(batch.prompts_RP, left), np.pad(batch.prompt_mask_RP, left)
    return *prompts, np.pad(batch.tokens_RT, right), np.pad(batch.mask_RT, right)


def advantages(rewards: list[float], group: int) -> np.ndarray:
    """Rewards less their group's mean, over its standard deviation."""
    grouped = np.array(rewards, np.float32).reshape(-1, group)
    centred = grouped - grouped.mean(1, keepdims=True)
    return (centred / (grouped.std(1, keepdims=True) + 1e-4)).reshape(-1)


def updated(optimizer, exit_weight, policy, state, arrays, advantage_R):
    """One step of GRPO. Rollouts are fresh: the ratio of policies is 1, so a clip has no effect."""

    def loss(policy):
        log_probs_RT = lsjax.token_log_probs(policy, *arrays)
        found = -(advantage_R[:, None] * log_probs_RT).sum() / jnp.maximum(arrays[3].sum(), 1)
        if exit_weight:
            found += exit_weight * lsjax.rollout_exit_loss(policy, EXITS, *arrays)
        return found

    value, gradient = jax.value_and_grad(loss)(policy)
    updates, state = optimizer.update(gradient, state, policy)
    return optax.apply_updates(policy, updates), state, value


def figures_of(arguments: Arguments, name: str) -> list[list[dict[str, Any]]]:
    """The figures of each seed of a variant."""
    files = (file_of(arguments, name, seed) for seed in arguments.seeds)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def rows_of(arguments: Arguments) -> list[tuple[str, ...]]:
    """Rewards, acceptance and time of each variant, as means over its seeds."""
    ends = max(1, arguments.steps // 10)
    rows = [("rollouts", "reward: first", "last", "accepted: first", "last", "seconds a group")]
    for name in VARIANTS:
        seeds = figures_of(arguments, name)
        first, last = (
            mean([statistics.fmean(row["reward"] for row in own[part]) for own in seeds])
            for part in (slice(0, ends), slice(-ends, None))
        )
        accepted = [[row["accepted"] for row in own if "accepted" in row] for own in seeds]
        kept = [
            ", ".join(
                f"{e}: {mean([own[at][str(e)] for own in accepted]).value:.2f}" for e in EXITS
            )
            for at in (0, -1)
        ]
        seconds = mean(
            [statistics.median(row["seconds"] for row in own) / arguments.prompts for own in seeds]
        )
        rows.append((name, first.text(), last.text(), *kept, seconds.text(".3f")))
    return rows


def mean(values: list[float]) -> Estimate:
    """Over seeds."""
    return from_seeds([Estimate(value) for value in values])


def draw(arguments: Arguments) -> None:
    """Rewards, acceptance, and seconds of rollouts, by step."""
    figure, (rewards, accepted, seconds) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    longest = 0.0  # of the last steps: the first ones compile
    for number, name in enumerate(VARIANTS):
        seeds, color = figures_of(arguments, name), f"C{number}"
        panels = (rewards, "reward", np.mean), (seconds, "seconds", np.median)
        for axes, field, middle in panels:
            values = middle([[row[field] for row in own] for own in seeds], 0)
            windows = np.lib.stride_tricks.sliding_window_view(values, min(10, len(values)))
            smooth = middle(windows, 1)
            axes.plot(range(len(smooth)), smooth, color=color, label=name)
        longest = max(longest, smooth[-1])
        for exit_layer, style in zip(EXITS, ("-", "--"), strict=True):
            counted = [row for row in seeds[0] if "accepted" in row]
            shares = [row["accepted"][str(exit_layer)] for row in counted]
            steps = [row["step"] for row in counted]
            label = None if number else f"exit {exit_layer}, colours as at the left"
            accepted.plot(steps, shares, style, color=color, label=label)
    rewards.set(ylabel="share of right answers", ylim=(0, 1.03), title="reward")
    accepted.set(ylabel="share of first drafts", ylim=(0.7, 1.01), title="accepted, first seed")
    seconds.set(ylabel="seconds of all groups of a step", ylim=(0, 2.5 * longest), title="rollouts")
    for axes, place in (rewards, "upper left"), (accepted, "lower right"), (seconds, "upper right"):
        axes.set(xlabel="step")
        axes.legend(frameon=False, fontsize="small", loc=place)
    figure.savefig(arguments.output / "grpo.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
