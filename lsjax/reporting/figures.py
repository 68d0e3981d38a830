"""Figures of a report, with their intervals: the answer, and what its tables and pictures show."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.acceptance import Acceptance
from lsjax.evaluation.intervals import Estimate, from_samples, from_seeds, ratio
from lsjax.evaluation.scores import ALL, Cell
from lsjax.evaluation.speeds import cell_speeds
from lsjax.reporting.record import Kind, Measured, Report

NAMES: dict[Kind, str] = {
    "layerskip": "with LayerSkip",
    "plain": "without LayerSkip",
    "given": "as it is",
}


@dataclass(frozen=True)
class Speed:
    """A strategy on the held-out prompts. figures: of the first training (`cell_speeds`)."""

    cell: Cell
    speedup: Estimate
    tokens_per_second: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """The figures behind the answer. Differences are with LayerSkip minus without."""

    best: Speed | None  # None if no strategy drafted
    loss: Estimate
    plain_loss: Estimate | None
    loss_difference: Estimate | None
    scores: dict[Kind, Estimate]

    @property
    def pays(self) -> bool | None:
        """Whether drafting is faster, beyond the interval; None if that stays open."""
        if self.best is None:
            return False
        low, high = self.best.speedup.low, self.best.speedup.high
        if low is None or high is None or low <= 1 <= high:
            return None
        return low > 1


def summarised(report: Report) -> Summary:
    """The answer's figures."""
    main, plain = report.main, report.of("plain")
    loss = losses(report, main)[-1]
    drafted = [one for one in speeds(report) if one.cell.strategy != "autoregressive"]
    own = [one for one in drafted if one.cell.strategy != "early_exit"]
    best = max(own, key=lambda one: (one.figures["trusted"], one.speedup.value), default=None)
    found = {kind: score(report, kind) for kind in NAMES if report.score and report.of(kind)}
    scores = {kind: one for kind, one in found.items() if one is not None}
    if not plain:
        return Summary(best, loss, None, None, scores)
    pairs = zip(report.of(main), plain, strict=True)
    differences = from_seeds([loss_difference(one, other) for one, other in pairs])
    return Summary(best, loss, losses(report, "plain")[-1], differences, scores)


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


def loss_difference(one: Measured, other: Measured) -> Estimate:
    """Difference of the last exit's loss on the same batches."""
    gaps = np.array(one.loss_nE)[:, -1] - np.array(other.loss_nE)[:, -1]
    return from_samples(ratio, gaps, one.tokens_n, of="batches")


def score(report: Report, kind: Kind) -> Estimate | None:
    """Mean score of the full model's answers; None without answers."""
    found = []
    for one in report.of(kind):
        own = [a["scores"][report.score] for a in one.answers if Cell.of(a) == Cell(PLAIN)]
        if not own:
            return None
        found.append(from_samples(np.mean, own, of="prompts"))
    return from_seeds(found)


PLAIN = "autoregressive"


def speeds(report: Report) -> list[Speed]:
    """Each strategy of the models that draft, autoregressive decoding first."""
    by_cell: dict[Cell, list[dict[str, Any]]] = {}
    for one in report.of(report.main):
        # A text of one token has no speed.
        timed = [answer for answer in one.answers if answer["num_new_tokens"] > 1]
        for row in cell_speeds(report.shape, timed) if timed else ():
            if row["group"] == ALL:
                by_cell.setdefault(Cell.of(row), []).append(row)
    found = []
    for cell, rows in by_cell.items():
        each = [
            Estimate(
                row["speedup"], row["speedup_low"], row["speedup_high"], "prompts", row["texts"]
            )
            for row in rows
        ]
        rate = statistics.fmean(row["tokens_per_second"] for row in rows)
        found.append(Speed(cell, from_seeds(each), rate, rows[0]))
    return found


def accepted(report: Report) -> Acceptance | None:
    """Counts of drafts of the longest draft length, over all seeds; None if nothing drafted."""
    rows = []
    for one in report.of(report.main):
        own = [a for a in one.answers if a["strategy"] == SelfSpeculative.name]
        rows += [{**answer, "id": f"{one.seed} {answer['id']}"} for answer in own]
    most = max((row["num_draft_tokens"] for row in rows), default=None)
    rows = [row for row in rows if row["num_draft_tokens"] == most]
    return Acceptance.of(rows) if rows else None


def in_words(report: Report) -> str:
    """The answer in a few sentences."""
    found = summarised(report)
    parts = []
    if found.best is None:
        parts.append("Nothing was drafted.")
    else:
        verdict = {True: "Yes", False: "No", None: "Not clear"}[found.pays]
        name = described(found.best.cell)
        parts.append(
            f"{verdict}: {name} writes {found.best.speedup.text()} times as many tokens a second "
            f"as autoregressive decoding."
        )
    losses_ = f"Held-out loss {found.loss.value:.3f}"
    if found.plain_loss is not None and found.loss_difference is not None:
        losses_ += f", without LayerSkip {found.plain_loss.value:.3f}"
        losses_ += f" (difference {found.loss_difference.text('+.3f')})"
    parts.append(f"{losses_}.")
    if found.scores:
        each = (f"{one.text('.3f')} {NAMES[kind]}" for kind, one in found.scores.items())
        parts.append(f"Score ({report.score}): {', '.join(each)}.")
    return " ".join(parts)


def described(cell: Cell) -> str:
    """A strategy in words: exit 8 with 4 drafts."""
    if cell.exit_layer is None:
        return cell.strategy.replace("_", " ")
    if cell.num_draft_tokens is None:
        return f"early exit {cell.exit_layer}"
    drafts = f"{cell.num_draft_tokens} draft{'s' * (cell.num_draft_tokens != 1)}"
    words = f"exit {cell.exit_layer} with {drafts}"
    if cell.draft_vocab is not None:
        words += f", vocabulary {cell.draft_vocab:,}"
    if cell.draft_confidence is not None:
        words += f", confidence {cell.draft_confidence:g}"
    return words
