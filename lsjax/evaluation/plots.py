"""Pictures of what LayerSkip does to a model: every exit's loss and agreement, and a run's curves.

Needs the `plots` extra (matplotlib); every function writes one PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsjax.config import ConfigError
from lsjax.evaluation.exits import ExitScores

# Legible in print and to people who do not tell red from green (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 150


def plot_exits(scores: Mapping[str, ExitScores], path: Path, *, title: str = "") -> None:
    """Loss and agreement with the final argmax by exit, a line for each model (the paper's Figures
    6 and 8).

    scores: by the name that the legend gives; the models may differ in their number of layers.
    """
    figure, (losses, agreements) = _figure(1, 2, (10, 4))
    for (name, score), colour in zip(scores.items(), _colours(scores), strict=True):
        exits = range(1, len(score.loss_E) + 1)
        style = dict(label=name, color=colour, marker="o", markersize=3.5)
        losses.plot(exits, score.loss_E, **style)
        agreements.plot(exits, score.agreement_E, **style)
    losses.set(xlabel="exit (layers run)", ylabel="loss (nats per token)")
    agreements.set(
        xlabel="exit (layers run)", ylabel="agreement with the final argmax", ylim=(0, 1.03)
    )
    for axes in (losses, agreements):
        _whole_numbers(axes)
    if len(scores) > 1:
        losses.legend(frameon=False)
    _save(figure, path, title)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """A run's curves by step: loss of the last exit and of the objective, evaluation losses by
    exit, learning rate and gradient norm.

    metrics: rows of a run's metrics.jsonl.
    """
    steps = [row for row in metrics if row.get("kind") == "step"]
    evaluations = [row for row in metrics if row.get("kind") == "evaluation"]
    if not steps:
        raise ConfigError(f"{path.name}: no steps to plot: give the metrics.jsonl of a run")
    figure, axes = _figure(1, 3, (14, 4))
    losses, by_exit, rates = axes
    at = [row["step"] for row in steps]
    losses.plot(at, [row["loss"] for row in steps], color="#BBBBBB", lw=1, label="objective")
    losses.plot(
        at, [row["last_exit_loss"] for row in steps], color=COLOURS[0], lw=1, label="last exit"
    )
    if evaluations:
        last = len(evaluations[0]["loss_E"])
        when = [row["step"] for row in evaluations]
        final = [row["loss_E"][-1] for row in evaluations]
        losses.plot(when, final, color=COLOURS[1], marker="o", ms=3, label="held out")
        chosen = sorted({max(1, round(last * share / 4)) for share in (1, 2, 3, 4)})
        for exit_layer, colour in zip(chosen, _colours(chosen), strict=True):
            values = [row["agreement_E"][exit_layer - 1] for row in evaluations]
            by_exit.plot(when, values, color=colour, marker="o", ms=3, label=f"exit {exit_layer}")
        by_exit.legend(frameon=False)
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    losses.legend(frameon=False)
    by_exit.set(xlabel="step", ylabel="agreement with the final argmax", ylim=(0, 1.03))
    rates.plot(at, [row["grad_norm"] for row in steps], color="#BBBBBB", lw=1)
    rates.set(xlabel="step", ylabel="gradient norm", yscale="log")
    twin = rates.twinx()
    twin.plot(at, [row["learning_rate"] for row in steps], color=COLOURS[0])
    twin.set_ylabel("learning rate", color=COLOURS[0])
    twin.set_ylim(bottom=0)
    _save(figure, path, title)


def check_plots() -> None:
    """Raises ConfigError where no plot can be made: better now than after the work."""
    _figure(1, 2, (1, 1))


def _figure(rows: int, columns: int, size: tuple[float, float]):
    """A figure of its own, without pyplot's global state: plots are also made beside training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'lsjax[plots]'") from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _whole_numbers(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _colours(names) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _save(figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
