"""The content of report.json: what was measured, and how. All figures of a page come from it."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lsjax.checkpoints.run import EVALUATION
from lsjax.config import AnyPath, Checked, ConfigError, LlamaConfig, check
from lsjax.config.checked import from_json
from lsjax.io.files import read_json, write_whole

FORMAT = 1
REPORT = "report.json"
CURVE = 200  # steps of a training that a report keeps
Kind = Literal["layerskip", "plain", "given"]


@dataclass(frozen=True, kw_only=True)
class Measured(Checked):
    """What was measured of one model. Index n is a batch of held-out rows, E - 1 is exit E."""

    kind: Kind
    """Trained with LayerSkip, trained as long without it, or not trained by the report."""
    seed: int = 0
    """Seed of the training."""
    exits: tuple[int, ...] = ()
    """Exits with a loss in training, besides the last one."""
    loss_nE: tuple[tuple[float, ...], ...]
    """Sums of the losses of the labelled tokens, in nats."""
    agreed_nE: tuple[tuple[float, ...], ...]
    """Labelled tokens where the exit's argmax is that of the last exit."""
    tokens_n: tuple[int, ...]
    """Labelled tokens."""
    training: tuple[dict[str, Any], ...] = ()
    """Rows of metrics.jsonl: evaluations, and evenly spaced steps."""
    training_seconds: float = 0.0
    """Wall time of the training, its start and compilation included."""
    answers: tuple[dict[str, Any], ...] = ()
    """One for each strategy and prompt (lsjax/evaluation/answers.py), without texts and tokens."""
    about: dict[str, str]
    """Machine, versions and date of the measurement, by heading."""
    alike: dict[str, Any]
    """What must be equal in models that are compared: machine, prompts, held-out text."""


@dataclass(frozen=True, kw_only=True)
class Report(Checked):
    """One report: its models, and how they were made and measured."""

    answer: str = ""
    """The answer in words (figures.py)."""
    title: str
    """Name of the model that was trained or measured."""
    shape: LlamaConfig
    """Shape of the models."""
    about: dict[str, str]
    """How it was made, by heading: command, machine, versions, data, and the like."""
    recipe: dict[str, Any]
    """Fields of the training's configuration that differ from their defaults."""
    score: str = ""
    """Name of the task's main score; empty if the data is no task."""
    models: tuple[Measured, ...]
    texts: tuple[dict[str, Any], ...] = ()
    """Held-out texts with the origin of each token (texts.py)."""

    def of(self, kind: Kind) -> list[Measured]:
        """The models of a kind, one for each seed."""
        return [one for one in self.models if one.kind == kind]

    @property
    def alike(self) -> dict[str, Any]:
        """What must be equal in reports that are compared."""
        return {"seeds": len(self.of(self.main)), **self.models[0].alike}

    @property
    def main(self) -> Kind:
        """The kind of the models that draft."""
        return "layerskip" if self.of("layerskip") else "given"


def write_report(report: Report, directory: AnyPath) -> None:
    """Writes report.json."""
    content = json.dumps({"format": FORMAT, **asdict(report)}, ensure_ascii=False)
    write_whole(directory / REPORT, content.encode())


def read_report(directory: AnyPath) -> Report:
    """Reads a report directory. Raises ConfigError if it holds no report of this format."""
    file = directory / REPORT
    check(file.is_file(), f"{directory} has no {REPORT}: name the --output of a finished report")
    raw = read_json(file, ConfigError)
    version = raw.pop("format", None)
    check(version == FORMAT, f"{file} has format {version}, but this lsjax reads {FORMAT}: redo it")
    return from_json(Report, raw, str(file))


def curve(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Evaluations of a run, and evenly spaced steps with their losses."""
    rows = list(rows)
    steps = [row for row in rows if row["kind"] == "step"]
    names = ("kind", "step", "last_exit_loss", "exits", "exit_losses", "loss_E", "agreement_E")
    shown = steps[:: math.ceil(len(steps) / CURVE) or 1]
    shown += [row for row in rows if row["kind"] == EVALUATION]
    return tuple({name: row[name] for name in names if name in row} for row in shown)
