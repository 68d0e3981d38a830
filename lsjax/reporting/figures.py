"""Figures of a report, with their intervals: the answer, and what its tables and pictures show."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsjax.config import LlamaConfig
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.evaluation.acceptance import Acceptance
from lsjax.evaluation.intervals import Estimate, from_samples, from_seeds, ratio
from lsjax.evaluation.scores import ALL, Cell
from lsjax.evaluation.speeds import cell_speeds
from lsjax.reporting.record import Kind, Measured, Report

# Figures of which a report shows the mean over its seeds.
MEANS = ("tokens_per_second", "acceptance_rate", "tokens_per_round", "ideal", "repeated_4grams")
NAMES: dict[Kind, str] = {
    "layerskip": "with LayerSkip",
    "plain": "without LayerSkip",
    "given": "as it is",
}


@dataclass(frozen=True)
class Speed:
    """A strategy on the held-out prompts. figures: of `cell_speeds`, as means over the seeds."""

    cell: Cell
    speedup: Estimate
    figures: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """The figures behind the answer. Differences are with LayerSkip minus without."""

    auto: Speed | None  # None if nothing was decoded
    fixed: Speed | None  # the fastest static setting, chosen on the same prompts
    loss: Estimate
    plain_loss: Estimate | None
    loss_difference: Estimate | None
    scores: dict[Kind, Estimate]
    score_difference: Estimate | None

    @property
    def pays(self) -> bool | None:
        """Whether auto is faster, beyond its interval; None if that stays open."""
        found = self.auto
        if found is None:
            return False
        low, high = found.speedup.low, found.speedup.high
        if low is None or high is None or low <= 1 <= high or not found.figures["trusted"]:
            return None
        return low > 1


def summarised(report: Report) -> Summary:
    """The answer's figures."""
    main, plain, found = report.main, report.of("plain"), speeds(report)
    fixed = [one for one in found if one.cell.strategy == SelfSpeculative.name]
    scores = {kind: score(report, kind) for kind in NAMES if report.score}
    return Summary(
        auto=next((one for one in found if one.cell.strategy == Adaptive.name), None),
        fixed=max(fixed, key=lambda one: (one.figures["trusted"], one.speedup.value), default=None),
        loss=losses(report, main)[-1],
        plain_loss=losses(report, "plain")[-1] if plain else None,
        loss_difference=loss_differences(report.of(main), plain) if plain else None,
        scores={kind: one for kind, one in scores.items() if one is not None},
        score_difference=score_difference(report) if plain and report.score else None,
    )


def losses(report: Report, kind: Kind) -> list[Estimate]:
    """Loss of each exit in nats a token, exit 1 first."""
    return _by_exit(report.of(kind), lambda one: one.loss_nE)


def agreements(report: Report, kind: Kind) -> list[Estimate]:
    """Share of tokens where an exit's argmax is that of the last exit, exit 1 first."""
    return _by_exit(report.of(kind), lambda one: one.agreed_nE)


def _by_exit(
    models: Sequence[Measured], sums: Callable[[Measured], Sequence[Sequence[float]]]
) -> list[Estimate]:
    found = []
    for exit_layer in range(len(sums(models[0])[0])):
        own = [
            from_samples(ratio, np.array(sums(one))[:, exit_layer], one.tokens_n, of="batches")
            for one in models
        ]
        found.append(from_seeds(own))
    return found


def loss_differences(ones: Sequence[Measured], others: Sequence[Measured]) -> Estimate:
    """Loss of the last exit minus that of other models with the same seeds, on the same batches."""
    pairs = zip(ones, others, strict=True)
    return from_seeds([loss_difference(one, other) for one, other in pairs])


def loss_difference(one: Measured, other: Measured) -> Estimate:
    """Difference of the last exit's loss on the same batches."""
    gaps = np.array(one.loss_nE)[:, -1] - np.array(other.loss_nE)[:, -1]
    return from_samples(ratio, gaps, one.tokens_n, of="batches")


def score(report: Report, kind: Kind) -> Estimate | None:
    """Mean score of the full model's answers; None without answers."""
    each = [_full_model_scores(report, one) for one in report.of(kind)]
    return _mean_score([list(scores.values()) for scores in each])


def score_difference(report: Report) -> Estimate | None:
    """Score with LayerSkip minus that without, on the same prompts; None without answers."""
    gaps = []
    for pair in zip(report.of("layerskip"), report.of("plain"), strict=True):
        one, other = (_full_model_scores(report, model) for model in pair)
        gaps.append([one[prompt] - other[prompt] for prompt in one if prompt in other])
    return _mean_score(gaps)


def _full_model_scores(report: Report, model: Measured) -> dict[tuple[str, int], float]:
    """Score of each answer by autoregressive decoding, by prompt and sample."""
    own = [one for one in model.answers if one["strategy"] == Autoregressive.name]
    return {(one["id"], one["sample"]): one["scores"][report.score] for one in own}


def _mean_score(each: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean over the prompts and the trainings; None if a training has no scores."""
    if not each or not all(each):
        return None
    return from_seeds([from_samples(np.mean, own, of="prompts") for own in each])


def speeds(report: Report) -> list[Speed]:
    """Each strategy of the models that draft, autoregressive decoding first."""
    by_cell: dict[Cell, list[dict[str, Any]]] = {}
    for one in report.of(report.main):
        for row in rows_of(report.shape, one):
            by_cell.setdefault(Cell.of(row), []).append(row)
    return [_over_seeds(cell, rows) for cell, rows in by_cell.items()]


def rows_of(shape: LlamaConfig, model: Measured) -> list[dict[str, Any]]:
    """`cell_speeds` of a model, over all of its answers. A text of one token has no speed."""
    names = ("num_new_tokens", "base_num_new_tokens")
    timed = [answer for answer in model.answers if min(answer[name] for name in names) > 1]
    return [row for row in cell_speeds(shape, timed) if row["group"] == ALL] if timed else []


def _over_seeds(cell: Cell, rows: Sequence[dict[str, Any]]) -> Speed:
    """Means over the trainings. Figures are trusted if those of all are."""
    each = [
        Estimate(
            value=row["speedup"],
            low=row["speedup_low"],
            high=row["speedup_high"],
            of="prompts",
            count=row["texts"],
        )
        for row in rows
    ]
    speedup = from_seeds(each)
    figures = dict(rows[0])
    for name in MEANS:
        known = [row[name] for row in rows if row[name] is not None]
        figures[name] = statistics.fmean(known) if known else None
    figures |= {
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "interval_of": speedup.of,
        "trusted": all(row["trusted"] for row in rows),
    }
    return Speed(cell, speedup, figures)


def equal_texts(report: Report) -> tuple[int, int]:
    """Greedy texts with drafts that equal those of autoregressive decoding, and all such texts."""
    found = [
        one["difference"] is None
        for model in report.of(report.main)
        for one in model.answers
        if one["strategy"] != Autoregressive.name and one["seed"] is None
    ]
    return sum(found), len(found)


def choices(report: Report) -> list[tuple[str, float, float]]:
    """What auto drafted with: the source ("exit 2", "lookup" or "none"), its share of the rounds,
    and tokens of such a round. The most frequent one comes first."""
    rounds: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for one in report.of(report.main):
        for answer in one.answers:
            for name, own in (answer["sources"] or {}).items():
                rounds[name] += own["rounds"]
                tokens[name] += own["tokens"]
    total = sum(rounds.values())
    return [(name, count / total, tokens[name] / count) for name, count in rounds.most_common()]


def accepted(report: Report) -> Acceptance | None:
    """Counts of drafts of the longest draft length, over all seeds; None if nothing drafted."""
    models = report.of(report.main)
    rows = [row for one in models for row in one.answers if row["strategy"] == SelfSpeculative.name]
    most = max((row["num_draft_tokens"] for row in rows), default=None)
    rows = [row for row in rows if row["num_draft_tokens"] == most]
    return Acceptance.of(rows) if rows else None


def in_words(report: Report) -> str:
    """The answer in a few sentences."""
    found, parts = summarised(report), []
    if found.auto is None:
        parts.append("Nothing was decoded.")
    else:
        verdict = {True: "Yes", False: "No", None: "Not clear"}[found.pays]
        parts.append(
            f"{verdict}: auto writes {in_doubt(found.auto)} times as many tokens a second as "
            "autoregressive decoding."
        )
    if found.fixed is not None:
        parts.append(f"The best fixed setting, {found.fixed.cell}, writes {in_doubt(found.fixed)}.")
    loss = f"Held-out loss {found.loss.value:.3f}"
    if found.plain_loss is not None and found.loss_difference is not None:
        loss += f", without LayerSkip {found.plain_loss.value:.3f}"
        loss += f"; difference {found.loss_difference.text('+.3f')}"
    parts.append(f"{loss}.")
    if found.scores:
        each = (f"{one.text('.3f')} {NAMES[kind]}" for kind, one in found.scores.items())
        words = ", ".join(each)
        if found.score_difference is not None:
            words += f"; difference {found.score_difference.text('+.3f')}"
        parts.append(f"Score ({report.score}): {words}.")
    return " ".join(parts)


def in_doubt(one: Speed) -> str:
    """A speedup, with a question mark if the machine was probably busy."""
    return one.speedup.text() + "?" * (not one.figures["trusted"])
