"""Compares reports on one page: the differences from the first, with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsjax.config import AnyPath, ConfigError
from lsjax.config.checked import differences, shown
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.evaluation.intervals import Estimate, from_samples
from lsjax.evaluation.plots import plot_exits
from lsjax.evaluation.speeds import doubts
from lsjax.reporting.figures import (
    Speed,
    agreements,
    in_doubt,
    loss_differences,
    losses,
    speeds,
    summarised,
)
from lsjax.reporting.page import shown_content, with_source, write_forms
from lsjax.reporting.pictures import EXITS
from lsjax.reporting.record import Report, read_report


def compare(directories: Sequence[AnyPath], output: AnyPath) -> tuple[str, AnyPath]:
    """Writes the page that compares reports; returns its answer and its file.

    Raises ConfigError if a directory holds no report, or if two were not measured alike: on other
    machines, with other held-out text, prompts or settings.
    """
    by_name = {directory.name: read_report(directory) for directory in directories}
    (first_name, first), *others = by_name.items()
    for name, other in others:
        for path, one, two in differences(first.alike, other.alike):
            raise ConfigError(
                f"{first_name} and {name} were not measured alike ({path}: {shown(one)} and "
                f"{shown(two)}): repeat one of them like the other"
            )
    output.mkdir(parents=True, exist_ok=True)
    trained = sorted({exit_ for one in by_name.values() for exit_ in one.of(one.main)[0].exits})
    plot_exits(
        {name: losses(one, one.main) for name, one in by_name.items()},
        {name: agreements(one, one.main) for name, one in by_name.items()},
        output / EXITS,
        trained=trained,
    )
    answer = "; ".join(f"{name}: {_sentence(first, one)}" for name, one in by_name.items())
    content = shown_content(f"{len(by_name)} reports", answer)
    content["warning"] = doubts([row.figures for one in by_name.values() for row in speeds(one)])
    content["facts"] = [fact for name, one in by_name.items() for fact in _facts(name, one, first)]
    content["about"] = {name: one.about.get("command", "") for name, one in by_name.items()}
    content["about"] |= {name: str(value) for name, value in first.alike.items() if value}
    return answer, write_forms(content | {"pictures": [EXITS]}, output)


def _sentence(first: Report, other: Report) -> str:
    """Loss and speeds of a report, and how its loss differs from the first one's."""
    found = summarised(other)
    parts = [f"loss {found.loss.value:.3f}"]
    if other is not first:
        gap = loss_differences(other.of(other.main), first.of(first.main))
        parts.append(f"difference {gap.text('+.3f')}")
    parts += [f"{one.cell} {in_doubt(one)}x" for one in _fast(found.auto, found.fixed)]
    return ", ".join(parts)


def _fast(*given: Speed | None) -> list[Speed]:
    return [one for one in given if one is not None]


def _facts(name: str, report: Report, first: Report) -> list[tuple[str, str]]:
    found, is_other = summarised(report), report is not first
    rows = [(f"{name}: held-out loss", with_source(found.loss, ".3f"))]
    if is_other:
        gap = loss_differences(report.of(report.main), first.of(first.main))
        rows.append((f"{name}: difference of the loss", with_source(gap, "+.3f")))
    if report.main in found.scores:
        rows.append((f"{name}: {report.score}", with_source(found.scores[report.main], ".3f")))
    rows += [
        (f"{name}: speedup of {one.cell}", with_source(one.speedup, ".2f"))
        for one in _fast(found.auto, found.fixed)
    ]
    if is_other and (times := auto_ratio(first, report)) is not None:
        rows.append((f"{name}: speed of auto over the first's", with_source(times, ".2f")))
    return rows


def auto_ratio(first: Report, other: Report) -> Estimate | None:
    """Tokens per second of auto over those of the first report, on the same prompts."""
    rates = [_rates(report) for report in (other, first)]
    common = [id_ for id_ in rates[0] if id_ in rates[1]]
    if not common:
        return None
    ratios = [rates[0][id_] / rates[1][id_] for id_ in common]
    return from_samples(np.median, ratios, of="prompts")


def _rates(report: Report) -> dict[Any, float]:
    """Tokens per second of auto by prompt, in the model of the first seed."""
    own = report.of(report.main)[0].answers
    timed = (a for a in own if a["strategy"] == Adaptive.name and a["num_new_tokens"] > 1)
    return {a["id"]: (a["num_new_tokens"] - 1) / a["decode_seconds"] for a in timed}
