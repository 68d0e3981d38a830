"""Compares reports on one page: the differences from the first, with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsjax.config import AnyPath, check
from lsjax.config.checked import differences, shown
from lsjax.evaluation.intervals import Estimate, from_samples, from_seeds
from lsjax.evaluation.plots import plot_exits
from lsjax.evaluation.scores import Cell
from lsjax.reporting.figures import (
    agreements,
    loss_difference,
    losses,
    score,
    summarised,
)
from lsjax.reporting.page import shown_content, with_source, write_forms
from lsjax.reporting.pictures import EXITS
from lsjax.reporting.record import Report, read_report

AUTO = Cell("auto")


def compare(directories: Sequence[AnyPath], output: AnyPath) -> tuple[str, AnyPath]:
    """Writes the page that compares reports; returns its answer and its file.

    Raises ConfigError if a directory holds no report, or if two were not measured alike: on other
    machines, with other held-out text, prompts or settings.
    """
    names = [directory.name for directory in directories]
    check(len(names) > 1, f"--compare has only {names[0]}: name at least two reports")
    check(len({*names}) == len(names), f"two reports have the same name ({names}): rename one")
    reports = [read_report(directory) for directory in directories]
    first = reports[0]
    for name, other in zip(names[1:], reports[1:], strict=True):
        for path, one, two in differences(first.alike, other.alike):
            check(
                False,
                f"{names[0]} and {name} were not measured alike ({path}: {shown(one)} and "
                f"{shown(two)}): repeat one of them like the other",
            )
    by_name = dict(zip(names, reports, strict=True))
    output.mkdir(parents=True, exist_ok=True)
    of_exits = ({name: of(one, one.main) for name, one in by_name.items()} for of in CURVES)
    trained = sorted({exit_layer for one in reports for exit_layer in one.of(one.main)[0].exits})
    plot_exits(*of_exits, output / EXITS, trained=trained)
    answer = "; ".join(f"{name}: {_sentence(first, one)}" for name, one in by_name.items())
    content = shown_content(f"{len(names)} reports", answer)
    content["facts"] = [fact for name, one in by_name.items() for fact in _facts(name, one, first)]
    content["about"] = {name: one.about.get("command", "") for name, one in by_name.items()}
    content["about"] |= {name: str(value) for name, value in first.alike.items() if value}
    return answer, write_forms(content | {"pictures": [EXITS]}, output)


CURVES = (losses, agreements)


def _sentence(first: Report, other: Report) -> str:
    """Loss and the best speed of a report, and how they differ from the first one's."""
    found = summarised(other)
    best = "nothing drafts"
    if found.best is not None:
        best = f"{found.best.cell} at {found.best.speedup.value:.2f}x"
    if other is first:
        return f"loss {found.loss.value:.3f}, {best}"
    gap = loss_differences(first, other)
    return f"loss {found.loss.value:.3f} ({gap.text('+.3f')}), {best}"


def _facts(name: str, report: Report, first: Report) -> list[tuple[str, str]]:
    found, others = summarised(report), report is not first
    rows = [(f"{name}: held-out loss", with_source(found.loss, ".3f"))]
    if others:
        gap = loss_differences(first, report)
        rows.append((f"{name}: difference of the loss", with_source(gap, "+.3f")))
    if report.score and (own := score(report, report.main)) is not None:
        rows.append((f"{name}: {report.score}", with_source(own, ".3f")))
    best = found.best
    if best is not None:
        rows.append((f"{name}: speedup of {best.cell}", with_source(best.speedup, ".2f")))
    if others and (times := auto_ratio(first, report)) is not None:
        rows.append((f"{name}: speed of auto over the first's", with_source(times, ".2f")))
    return rows


def loss_differences(first: Report, other: Report) -> Estimate:
    """Loss of the last exit minus that of the first report, on the same batches."""
    pairs = zip(other.of(other.main), first.of(first.main), strict=False)
    return from_seeds([loss_difference(one, two) for one, two in pairs])


def auto_ratio(first: Report, other: Report) -> Estimate | None:
    """Tokens per second of auto over those of the first report, on the same prompts."""
    rates = [_rates(report) for report in (other, first)]
    common = [id_ for id_ in rates[0] if id_ in rates[1]]
    if not common:
        return None
    ratios = [rates[0][id_] / rates[1][id_] for id_ in common]
    return from_samples(np.median, ratios, of="prompts")


def _rates(report: Report) -> dict[Any, float]:
    """Tokens per second of auto by prompt, in the models of the first seed."""
    own = report.of(report.main)[0].answers
    timed = (one for one in own if Cell.of(one) == AUTO and one["num_new_tokens"] > 1)
    return {one["id"]: (one["num_new_tokens"] - 1) / one["decode_seconds"] for one in timed}
