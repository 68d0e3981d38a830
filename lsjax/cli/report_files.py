"""What lies in the directories of runs, sweeps and evaluations, read for a report."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lsjax.checkpoints import CONFIG, is_run, read_metrics
from lsjax.checkpoints.safetensors_files import read_json
from lsjax.config import ConfigError, LlamaConfig, check
from lsjax.config.json_form import from_json, without_version
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.speed import Row

SWEEP, EVALUATION = "sweep.json", ".summary.json"
# Of an evaluation's rows, what a report shows.
FIGURES = (
    *("strategy", "group", "examples", "scores", "tokens_per_second", "ms_per_token", "speedup"),
    *("acceptance_rate", "tokens_per_round", "ideal", "share_of_ideal"),
)
T = TypeVar("T")


@dataclass(frozen=True)
class Sweep:
    """A sweep.json of lsjax.cli.sweep."""

    name: str
    title: str
    rows: list[Row]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """A .summary.json of lsjax.cli.evaluate."""

    name: str
    asked: dict[str, Any]
    bad_rows: list[str]
    figures: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """Everything that a directory or file holds; what it lacks is empty or None."""

    name: str
    config: dict[str, Any] | None = None  # as it is in the file: it may be another version's
    model: LlamaConfig | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def scores(self) -> ExitScores | None:
        """Of every exit, at the run's last evaluation."""
        rows = [row for row in self.metrics if row["kind"] == "evaluation"]
        if not rows:
            return None
        # What was no number when it was logged is null there.
        loss_E, agreement_E = (
            tuple(math.nan if value is None else value for value in rows[-1][name])
            for name in ("loss_E", "agreement_E")
        )
        return ExitScores(loss_E, agreement_E, rows[-1]["tokens"])

    @property
    def step(self) -> int | None:
        """The last step that was logged."""
        return self.metrics[-1]["step"] if self.metrics else None


def find(path: Path) -> Found:
    """What a training run's directory holds, and the sweeps and evaluations in it or one level
    below; or what any other directory or a single file of theirs holds.

    Raises ConfigError where there is nothing, or a file that is not what its name says.
    """
    check(path.exists(), f"{path} does not exist: name a run, a sweep or an evaluation")
    if path.is_dir():
        places = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
        files = [file for place in places for file in sorted(place.iterdir())]
    else:
        files = [path]
    run = path.is_dir() and is_run(path)
    config = without_version(read_json(path / CONFIG), str(path / CONFIG)) if run else None
    found = Found(
        path.resolve().name,
        config,
        from_json(LlamaConfig, config["model"], f"{path / CONFIG}: model") if run else None,
        read_metrics(path) if run else [],
        [_read(file, _sweep) for file in files if file.name == SWEEP],
        [_read(file, _evaluation) for file in files if file.name.endswith(EVALUATION)],
    )
    check(
        run or bool(found.sweeps or found.evaluations),
        f"{path} holds nothing to report: name a --workdir of train.py, or what lsjax.cli.sweep or "
        "lsjax.cli.evaluate wrote",
    )
    return found


def _sweep(file: Path, raw: dict[str, Any]) -> Sweep:
    rows = [Row(**row) for row in raw["rows"]]
    return Sweep(file.resolve().parent.name, raw["title"], rows, raw["samples"])


def _evaluation(file: Path, raw: dict[str, Any]) -> Evaluation:
    name = file.name.removesuffix(EVALUATION)
    figures = [{key: row[key] for key in FIGURES} for row in raw["figures"]]
    return Evaluation(name, raw["asked"], raw["bad_rows"], figures)


def _read(file: Path, make: Callable[[Path, dict[str, Any]], T]) -> T:
    try:
        return make(file, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is not what its name says ({error!r}): remove it, or write it again"
        ) from None
