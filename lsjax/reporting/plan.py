"""The plan of a report: how much to train and to decode, fixed once so that it fits the time.

The plan is kept in the report's directory. A resumed report reads it, so it is the same report.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from lsjax.config import AnyPath, Checked, ConfigError, Sampling, TrainConfig, check
from lsjax.config.checked import differences, from_json, shown
from lsjax.io.files import read_json, write_json
from lsjax.reporting.recipes import with_steps

PLAN = "plan.json"
SPEEDS = "speeds.json"  # of a report whose time was too short
DECODING, SCORING = 0.25, 0.05  # shares of the time, at most, but for the fewest
# Few numbers of prompts, and of batches of held-out rows on which the exits are scored: so reports
# of equal times can be compared.
PROMPTS, BATCHES = (8, 16, 32), (8, 16, 32, 64)
FEWEST_STEPS = 20
DEFAULT_MINUTES = 60.0
SLOWER = 1.06  # steps and tokens may take longer than in the first minute
CHEAPER = 0.8  # time of a text by another strategy, of that by autoregressive decoding


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

    @property
    def keeps_steps(self) -> bool:
        """Whether the number of steps is given, and not found from the time."""
        return self.minutes is None or self.config.num_steps != self.base.num_steps


@dataclass(frozen=True, kw_only=True)
class Speeds(Checked):
    """Seconds that were measured in the first minutes."""

    step: float = 0.0
    """A training step with LayerSkip."""
    plain_step: float = 0.0
    """A training step without it."""
    start: float = 0.0
    """Start, compilation and end of one training."""
    batch: float = 0.0
    """Scoring all exits on a held-out batch."""
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
    num_batches: int = BATCHES[-1]
    speeds: Speeds | None = None


def make_plan(asked: Asked, speeds: Speeds, strategies: int, spent: float) -> Plan:
    """Fits a report into its time.

    strategies: that decode each prompt, autoregressive decoding included. spent: seconds so far.
    Raises ConfigError if the time is too short.
    """
    minutes = asked.minutes or DEFAULT_MINUTES
    num_prompts, num_batches, steps = _affordable(asked, speeds, strategies, spent, minutes)
    made = dict(asked=asked, num_prompts=num_prompts, num_batches=num_batches, speeds=speeds)
    if not asked.training:
        return Plan(config=asked.config, **made)
    if asked.keeps_steps:
        return Plan(config=with_steps(asked.config, asked.base, asked.config.num_steps), **made)
    if steps < FEWEST_STEPS:
        needed = minutes
        while _affordable(asked, speeds, strategies, spent, needed)[2] < FEWEST_STEPS:
            needed += max(1.0, 0.05 * needed)
        raise ConfigError(
            f"--minutes {minutes:g} is too short for this model on this machine: give at least "
            f"{math.ceil(needed)}, or choose fewer --prompts, --num-draft-tokens or --new-tokens"
        )
    return Plan(config=with_steps(asked.config, asked.base, steps), **made)


def _affordable(
    asked: Asked, speeds: Speeds, strategies: int, spent: float, minutes: float
) -> tuple[int, int, int]:
    """Prompts, batches of held-out rows, and steps of each training that fit into the time."""
    total, models = 60 * minutes, asked.seeds * (2 if asked.training else 1)
    compiling, prompt = _decoding_seconds(asked, speeds, strategies)
    share = DECODING if asked.training else 1.0
    num_prompts = asked.prompts or _largest(PROMPTS, (share * total - spent - compiling) / prompt)
    batch = models * speeds.batch
    num_batches = _largest(BATCHES, SCORING * total / batch if batch else math.inf)
    fixed = spent + compiling + num_prompts * prompt + num_batches * batch + models * speeds.start
    step = asked.seeds * (speeds.step + speeds.plain_step) * SLOWER
    evaluation, every = asked.config.evaluation, asked.base.evaluation.every
    if evaluation.every == every:  # so many evaluations, however long the training is
        fixed += math.ceil(asked.base.num_steps / every) * evaluation.batches * batch
    else:
        step += evaluation.batches * batch / evaluation.every
    return num_prompts, num_batches, int((total - fixed) / step) if step else 0


def _decoding_seconds(asked: Asked, speeds: Speeds, strategies: int) -> tuple[float, float]:
    """Seconds of compiling and warming up, and of one prompt by all strategies. Models without
    LayerSkip decode by autoregressive decoding only."""
    text = asked.new_tokens * speeds.token * SLOWER
    prompt = text * (1 + CHEAPER * (strategies - 1) + asked.training) * asked.seeds
    programs = (strategies + asked.training) * asked.seeds
    return programs * speeds.compiling + prompt, prompt


def _largest(choices: Sequence[int], affordable: float) -> int:
    """The largest choice that is affordable, or else the smallest."""
    return max([choices[0], *(choice for choice in choices if choice <= affordable)])


def read_plan(directory: AnyPath, asked: Asked) -> Plan | None:
    """The plan of an earlier start, or None. Raises ConfigError, which names the first change, if
    the flags have changed since."""
    file = directory / PLAN
    if not file.exists():
        return None
    plan = from_json(Plan, read_json(file, ConfigError), str(file))
    before, now = asdict(plan.asked), asdict(asked)
    # The fields that flags give come first, then the recipe that this machine has chosen.
    order = sorted(now, key=lambda name: (name == "base", name == "config"))
    changes = [change for name in order for change in differences(before[name], now[name], name)]
    path, was, is_ = next(iter(changes), ("", None, None))
    check(
        not changes,
        f"{directory} was begun with {path.removeprefix('config.').removeprefix('base.')} "
        f"{shown(was)}, now it is {shown(is_)}: use the same flags and machine to resume it, or "
        "another --output",
    )
    return plan


def read_speeds(directory: AnyPath, asked: Asked) -> Speeds | None:
    """What an earlier start measured before its time turned out too short. None if there was none,
    or if flags other than --minutes have changed since."""
    file = directory / SPEEDS
    if not file.exists():
        return None
    kept = from_json(Plan, read_json(file, ConfigError), str(file))
    return kept.speeds if kept.asked == replace(asked, minutes=None) else None


def write_speeds(directory: AnyPath, asked: Asked, speeds: Speeds) -> None:
    """Keeps what was measured, so that another --minutes need not measure it again."""
    kept = Plan(asked=replace(asked, minutes=None), config=asked.config, num_prompts=1)
    write_json(directory / SPEEDS, asdict(replace(kept, speeds=speeds)))


def write_plan(directory: AnyPath, plan: Plan) -> None:
    """Keeps the plan for a resumed report."""
    write_json(directory / PLAN, asdict(plan))
