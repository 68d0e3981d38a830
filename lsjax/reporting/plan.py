"""The plan of a report: how much to train and to decode, fixed once so that it fits the time.

The plan is kept in the report's directory. A resumed report reads it, so it is the same report.
"""

import math
from dataclasses import asdict, dataclass

from lsjax.config import AnyPath, Checked, ConfigError, Sampling, TrainConfig, check
from lsjax.config.checked import differences, from_json, shown
from lsjax.io.files import read_json, write_json
from lsjax.reporting.recipes import with_steps

PLAN = "plan.json"
DECODING, SCORING = 0.25, 0.05  # shares of the time, at most, but for the fewest
FEWEST_PROMPTS, MOST_PROMPTS = 8, 32
FEWEST_BATCHES, MOST_BATCHES = 8, 64  # of held-out rows, on which the exits are scored
FEWEST_STEPS = 20
DEFAULT_MINUTES = 60.0
SLOWER = 1.06  # steps and tokens may take longer than in the first minute
CHEAPER = 0.8  # time of a text by another strategy, of that by autoregressive decoding
FORWARD = 1 / 3  # time of scoring a batch, of a training step


@dataclass(frozen=True, kw_only=True)
class Asked(Checked):
    """What the flags ask for."""

    model: str
    task: str | None
    training: bool
    minutes: float | None
    seeds: int
    prompts: int | None
    new_tokens: int
    exit_layers: tuple[int, ...]
    num_draft_tokens: tuple[int, ...]
    sampling: Sampling
    base: TrainConfig
    """The recipe or configuration before further flags."""
    config: TrainConfig
    """With further flags."""


@dataclass(frozen=True, kw_only=True)
class Speeds(Checked):
    """Seconds that were measured in the first minutes."""

    step: float = 0.0
    """A training step with LayerSkip."""
    plain_step: float = 0.0
    """A training step without it."""
    start: float = 0.0
    """Start, compilation and end of one training."""
    token: float
    """A token of autoregressive decoding."""
    compiling: float
    """Compiling one decoding program."""


@dataclass(frozen=True, kw_only=True)
class Plan(Checked):
    """What a report does.

    config: of the training with LayerSkip and seed 0, in its final length. num_prompts: that are
    decoded. num_batches: of held-out rows, on which the exits are scored.
    """

    asked: Asked
    config: TrainConfig
    num_prompts: int
    num_batches: int = MOST_BATCHES
    speeds: Speeds | None = None


def make_plan(asked: Asked, speeds: Speeds, strategies: int, spent: float) -> Plan:
    """Fits a report into its time.

    strategies: that decode each prompt, autoregressive decoding included. spent: seconds so far.
    Raises ConfigError if the time is too short.
    """
    total = 60 * (asked.minutes or DEFAULT_MINUTES)
    models = asked.seeds * (2 if asked.training else 1)
    compiling, prompt = _decoding_seconds(asked, speeds, strategies)
    share = DECODING if asked.training else 1.0
    num_prompts = asked.prompts or _within(
        FEWEST_PROMPTS, (share * total - spent - compiling) / prompt, MOST_PROMPTS
    )
    batch = models * speeds.plain_step * FORWARD
    num_batches = MOST_BATCHES
    if batch:
        num_batches = _within(FEWEST_BATCHES, SCORING * total / batch, MOST_BATCHES)
    made = dict(asked=asked, num_prompts=num_prompts, num_batches=num_batches, speeds=speeds)
    if not asked.training:
        return Plan(config=asked.config, **made)
    evaluation = asked.config.evaluation
    scored = num_batches + math.ceil(asked.base.num_steps / evaluation.every) * evaluation.batches
    fixed = spent + compiling + num_prompts * prompt + scored * batch + models * speeds.start
    step = asked.seeds * (speeds.step + speeds.plain_step) * SLOWER
    steps = int((total - fixed) / step)
    if asked.minutes is None or asked.config.num_steps != asked.base.num_steps:
        steps = asked.config.num_steps
    needed = math.ceil((fixed + FEWEST_STEPS * step) / 60)
    check(
        steps >= FEWEST_STEPS or steps == asked.config.num_steps,
        f"--minutes {asked.minutes} is too short for this model on this machine: give at least "
        f"{needed}, or choose fewer --prompts, --num-draft-tokens or --new-tokens",
    )
    return Plan(config=with_steps(asked.config, asked.base, steps), **made)


def _decoding_seconds(asked: Asked, speeds: Speeds, strategies: int) -> tuple[float, float]:
    """Seconds of compiling and warming up, and of one prompt by all strategies. Models without
    LayerSkip decode by autoregressive decoding only."""
    text = asked.new_tokens * speeds.token * SLOWER
    prompt = text * (1 + CHEAPER * (strategies - 1) + asked.training) * asked.seeds
    programs = (strategies + asked.training) * asked.seeds
    return programs * speeds.compiling + prompt, prompt


def _within(fewest: int, affordable: float, most: int) -> int:
    return max(fewest, min(most, int(affordable)))


def read_plan(directory: AnyPath, asked: Asked) -> Plan | None:
    """The plan of an earlier start; None if there is none. Raises ConfigError, with the first
    difference, if that start was asked for something else."""
    file = directory / PLAN
    if not file.exists():
        return None
    plan = from_json(Plan, read_json(file, ConfigError), str(file))
    changes = differences(asdict(plan.asked), asdict(asked))
    path, before, now = next(iter(changes), ("", None, None))
    check(
        not changes,
        f"{directory} was begun with {path.removeprefix('config.')} {shown(before)}, now it is "
        f"{shown(now)}: use the same flags to resume it, or another --output",
    )
    return plan


def write_plan(directory: AnyPath, plan: Plan) -> None:
    """Keeps the plan for a resumed report."""
    write_json(directory / PLAN, asdict(plan))
