"""Seconds of a group of rollouts: speculative, autoregressive, and Tunix's own.

    make test-extras   # installs Tunix
    python scripts/grpo_study.py --output build/evidence/grpo
    python scripts/rollout_speed.py --policy build/evidence/grpo/policy \\
        --output build/evidence/rollout_speed

All write texts of the same policy, whose ends make a tail. They take turns. Tunix decodes all rows
at once until the last one ends. A speedup is over autoregressive rollouts with as many rows. Prints
a table, and writes it for scripts/results.py.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro
from evidence_list import TABLE
from grpo_study import EXITS, NEW, sums
from jax.sharding import Mesh
from tunix.models.llama3 import model as tunix_llama, params
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

import lsjax
from lsjax.cli.setup import keep_compiled_programs
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table
from lsjax.rollouts.tunix import TunixTokenizer

PROMPT = 16  # tokens of a prompt, at most
BATCH_SIZES = (4, 16)  # rows, and as many as there are texts
WARM_UP = 8  # batches that are not timed: each number of rows has its programs
Generate = Callable[[list[str], int], int]  # prompts and a seed, to the number of new tokens


@dataclass(frozen=True)
class Arguments:
    """What to time."""

    policy: Path
    """Run of a policy that adds numbers."""
    output: Path
    """Folder of the table."""
    prompts: int = 8
    """Prompts of a batch."""
    group: int = 8
    """Texts of each."""
    repeats: int = 9
    """Timed batches."""


def main(arguments: Arguments) -> int:
    """Prints the table."""
    keep_compiled_programs()
    ways, asked = ways_of(arguments), sums(4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = dict.fromkeys(ways, 0)
    for repeat in range(-WARM_UP, arguments.repeats):
        prompts = [next(asked)[0] for _ in range(arguments.prompts)]
        for name, generate in ways.items():
            began = time.perf_counter()
            number = generate(prompts, 1_000 * (repeat + WARM_UP))
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
                tokens[name] += number
    texts = arguments.prompts * arguments.group
    lines = [("rollouts", f"seconds for {texts} texts", "lowest", "highest", "tokens/s", "speedup")]
    for name, own in seconds.items():
        median = statistics.median(own)
        figures = (f"{value:.3f}" for value in (median, min(own), max(own)))
        base = statistics.median(seconds[f"autoregressive, {name.rpartition(', ')[2]}"])
        lines.append((name, *figures, f"{tokens[name] / sum(own):.0f}", f"{base / median:.2f}x"))
    text = "\n".join([*table(lines), "", *table([("measured on", ""), *made_on().items()])])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / TABLE).write_text(text + "\n", "utf-8")
    print(text)
    return 0


def ways_of(arguments: Arguments) -> Mapping[str, Generate]:
    """Each way to write the texts."""
    policy, tokenizer = lsjax.load(arguments.policy), lsjax.load_tokenizer(arguments.policy)
    rows = arguments.prompts * arguments.group
    found: dict[str, Generate] = {}
    for name, strategy in {
        "autoregressive": lsjax.Autoregressive(),
        "speculative": lsjax.Adaptive(EXITS),
    }.items():
        for batch_size in (*BATCH_SIZES, rows):
            engine = lsjax.Rollouts(policy, tokenizer, strategy, batch_size=batch_size)
            found[f"{name}, {batch_size} rows"] = partial(ours, engine, arguments.group)
    found[f"Tunix's vanilla, {rows} rows"] = partial(
        tunix_s, tunix_engine(arguments, policy, tokenizer), arguments.group
    )
    return found


def ours(engine: lsjax.Rollouts, group: int, prompts: list[str], seed: int) -> int:
    """Writes texts with lsjax."""
    sampling = lsjax.Sampling(temperature=1.0, seed=seed)
    options = dict(group_size=group, max_new_tokens=NEW, sampling=sampling)
    return int(engine.generate(prompts, **options).mask_RT.sum())


def tunix_s(engine: VanillaRollout, group: int, prompts: list[str], seed: int) -> int:
    """Writes texts with Tunix."""
    config = RolloutConfig(
        max_tokens_to_generate=NEW,
        max_prompt_length=PROMPT,
        temperature=1.0,
        seed=jax.random.key(seed),
        return_logprobs=True,
    )
    repeated = [prompt for prompt in prompts for _ in range(group)]
    return sum(len(row) for row in engine.generate(repeated, config).tokens)


def tunix_engine(
    arguments: Arguments, policy: lsjax.Llama, text: lsjax.Tokenizer
) -> VanillaRollout:
    """Tunix's rollouts with the weights of the policy."""
    folder, shape = arguments.output / "exported", policy.config
    if not folder.exists():
        lsjax.save(policy, folder)
    config = tunix_llama.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=shape.rope_theta,
        norm_eps=shape.norm_eps,
        weight_tying=shape.tie_embeddings,
    )
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = params.create_model_from_safe_tensors(f"{folder}", config, mesh, dtype=np.float32)
    slots = NEW + 2 * PROMPT
    cache = CacheConfig(slots, shape.num_layers, shape.num_kv_heads, shape.head_dim)
    return VanillaRollout(model, TunixTokenizer(text), cache)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
