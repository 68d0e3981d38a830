"""Pictures of what LayerSkip does to a model: every exit's loss and agreement, and a run's curves.

Needs the `plots` extra (matplotlib); every function writes one PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsjax.config import ConfigError
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.figures import COLOURS, GREY, colours, figure, save, whole_numbers


def plot_exits(scores: Mapping[str, ExitScores], path: Path, *, title: str = "") -> None:
    """Loss and agreement with the final argmax by exit, a line for each model (the paper's Figures
    6 and 8).

    scores: by the name that the legend gives; the models may differ in their number of layers.
    """
    drawn, ((losses, agreements),) = figure(1, 2, (10, 4))
    for (name, score), colour in zip(scores.items(), colours(scores), strict=True):
        exits = range(1, len(score.loss_E) + 1)
        style = dict(label=name, color=colour, marker="o", markersize=3.5)
        losses.plot(exits, score.loss_E, **style)
        agreements.plot(exits, score.agreement_E, **style)
    losses.set(xlabel="exit (layers run)", ylabel="loss (nats per token)")
    agreements.set(
        xlabel="exit (layers run)", ylabel="agreement with the final argmax", ylim=(0, 1.03)
    )
    for axes in (losses, agreements):
        whole_numbers(axes)
    if len(scores) > 1:
        losses.legend(frameon=False)
    save(drawn, path, title)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """A run's curves by step: loss of the last exit and of the objective, evaluation losses by
    exit, learning rate and gradient norm.

    metrics: rows of a run's metrics.jsonl.
    """
    steps = [row for row in metrics if row.get("kind") == "step"]
    evaluations = [row for row in metrics if row.get("kind") == "evaluation"]
    if not steps:
        raise ConfigError(f"{path.name}: no steps to plot: give the metrics.jsonl of a run")
    drawn, ((losses, by_exit, rates),) = figure(1, 3, (14, 4))
    at = [row["step"] for row in steps]
    losses.plot(at, [row["loss"] for row in steps], color=GREY, lw=1, label="objective")
    losses.plot(
        at, [row["last_exit_loss"] for row in steps], color=COLOURS[0], lw=1, label="last exit"
    )
    if evaluations:
        last = len(evaluations[0]["loss_E"])
        when = [row["step"] for row in evaluations]
        final = [row["loss_E"][-1] for row in evaluations]
        losses.plot(when, final, color=COLOURS[1], marker="o", ms=3, label="held out")
        chosen = sorted({max(1, round(last * share / 4)) for share in (1, 2, 3, 4)})
        for exit_layer, colour in zip(chosen, colours(chosen), strict=True):
            values = [row["agreement_E"][exit_layer - 1] for row in evaluations]
            by_exit.plot(when, values, color=colour, marker="o", ms=3, label=f"exit {exit_layer}")
        by_exit.legend(frameon=False)
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    losses.legend(frameon=False)
    by_exit.set(xlabel="step", ylabel="agreement with the final argmax", ylim=(0, 1.03))
    rates.plot(at, [row["grad_norm"] for row in steps], color=GREY, lw=1)
    rates.set(xlabel="step", ylabel="gradient norm", yscale="log")
    twin = rates.twinx()
    twin.plot(at, [row["learning_rate"] for row in steps], color=COLOURS[0])
    twin.set_ylabel("learning rate", color=COLOURS[0])
    twin.set_ylim(bottom=0)
    save(drawn, path, title)
