"""The recipe of a report: which exits, weights, dropout and learning rate for which model.

Its numbers are close to those of configs/finetune_topv2_smollm2.py. On TOPv2, `auto` was fastest
with these exits, though intervals overlap (docs/results.md, "Recipes: three seeds on TOPv2"). Each
field is a flag, which replaces it.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import jax

from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EarlyExitConfig,
    EvaluationConfig,
    LayerDropoutConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
)
from lsjax.config.checked import differences, from_json
from lsjax.reporting.machine import multiplies_bfloat16

# Steps of the recipe before their number is known. Nobody asks for this number.
SAMPLE_STEPS = 9_960
# In a run, evenly spaced. Both come together at the last step only: a run that resumes at a saved
# step does not repeat the evaluation there.
EVALUATIONS, SAVES = 4, 5
HELD_OUT_BATCHES = 2  # of an evaluation during the run
PROMPT_TOKENS = 64
# Fields that count steps of a run.
_IN_STEPS = (("optimizer", "warmup_steps"), ("checkpoints", "every"), ("evaluation", "every"))


def recipe(model: LlamaConfig, init_from: str, data: DataConfig, num_steps: int) -> TrainConfig:
    """LayerSkip finetuning of a trained model in little time.

    The exits are at a sixteenth, an eighth and a quarter of the depth, with equal weights: those of
    the paper grow with the depth and would leave the first exits behind. The learning rate is
    inversely proportional to the width, and 1e-3 at 576. Steps are computed in bfloat16 where that
    is faster.
    """
    layers, on_cpu, early_exit = model.num_layers, jax.default_backend() == "cpu", EarlyExitConfig()
    exits = sorted({max(1, round(layers / part)) for part in (16, 8, 4)} - {layers})
    if exits:
        early_exit = EarlyExitConfig(
            curriculum="subset",
            exits=tuple(exits),
            weights="uniform",
            token_share=0.5 if on_cpu else 1.0,
        )
    return TrainConfig(
        model=model,
        init_from=init_from,
        data=data,
        num_steps=num_steps,
        batch_size=4 if on_cpu else 8,
        seq_len=min(model.max_context, 192 if on_cpu else 2_048),
        layer_dropout=LayerDropoutConfig(p_max=0.1),
        early_exit=early_exit,
        optimizer=OptimizerConfig(
            learning_rate=round(min(1e-3, 0.576 / model.hidden_size), 6),
            warmup_steps=max(1, num_steps // 25),
        ),
        dtype="bfloat16" if multiplies_bfloat16() else "float32",
        checkpoints=CheckpointConfig(every=max(1, num_steps // SAVES), keep_best=0),
        evaluation=EvaluationConfig(
            every=max(1, num_steps // EVALUATIONS),
            batches=HELD_OUT_BATCHES,
            sample_tokens=0,
            prompt_tokens=PROMPT_TOKENS,
        ),
    )


def with_steps(config: TrainConfig, base: TrainConfig, num_steps: int) -> TrainConfig:
    """A configuration with another number of steps. Steps of the warm-up, and between evaluations
    and saved steps, keep their share of it, unless they were changed from those of `base`."""
    raw, before = asdict(config), asdict(base)
    raw["num_steps"] = num_steps
    for section, name in _IN_STEPS:
        steps = raw[section][name]
        if steps == before[section][name]:
            steps = math.ceil(steps * num_steps / base.num_steps)
        raw[section][name] = min(num_steps, steps)
    return from_json(TrainConfig, raw, "the configuration")


def without_layerskip(config: TrainConfig) -> TrainConfig:
    """The control: the same training without layer dropout and without early exits in the loss."""
    return replace(config, layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig())


def chosen(config: TrainConfig) -> dict[str, Any]:
    """Fields by dotted path, apart from the model's shape and those with their default."""
    names = ("num_steps", "seq_len", "init_from")
    always = {name: getattr(config, name) for name in names}
    plain = TrainConfig(model=config.model, batch_size=1, **always)
    changed = differences(asdict(plain), asdict(config))
    shown = {path: value for path, _, value in changed if not path.startswith("model")}
    return {name: value for name, value in always.items() if value} | shown
