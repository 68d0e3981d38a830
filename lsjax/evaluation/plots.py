"""Pictures of what LayerSkip does to a model: every exit's loss and agreement, and a run's curves.

Needs the `plots` extra (matplotlib); every function writes one PNG.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lsjax.config import ConfigError
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.figures import COLOURS, GREY, colours, figure, magnitudes, save, whole_numbers


def plot_exits(
    scores: Mapping[str, ExitScores], file: Path | IO[bytes], *, title: str = ""
) -> None:
    """Loss and agreement with the final argmax by exit, a line for each model (the paper's Figures
    6 and 8).

    scores: by the name that the legend gives; the models may differ in their number of layers.
    """
    drawn, ((losses, agreements),) = figure(1, 2, (10, 4))
    for (name, score), colour in zip(scores.items(), colours(scores), strict=True):
        exits = range(1, len(score.loss_E) + 1)
        style = dict(label=name.replace("$", r"\$"), color=colour, marker="o", markersize=3.5)
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
    save(drawn, file, title)


def plot_training(
    metrics: Sequence[Mapping[str, Any]], file: Path | IO[bytes], *, title: str = ""
) -> None:
    """A run's curves by step: loss of the last and of some trained exits, held-out agreement of
    these exits, gradient norm and learning rate, and labelled tokens per second.

    metrics: rows of a run's metrics.jsonl. Losses and speed are means over a fortieth of the steps.
    """
    steps = [row for row in metrics if row.get("kind") == "step"]
    evaluations = [row for row in metrics if row.get("kind") == "evaluation"]
    if not steps:
        raise ConfigError("there are no steps to plot: give the metrics.jsonl of a run that began")
    drawn, ((losses, agreements), (rates, speeds)) = figure(2, 2, (11, 7))
    at = np.array([row["step"] for row in steps])
    losses.plot(at, _numbers(steps, "last_exit_loss"), color=GREY, lw=0.6, alpha=0.6)
    by_exit = _loss_by_exit(steps)
    last = max(by_exit)
    shown = sorted({_nearest(by_exit, last * share / 4) for share in (1, 2, 3, 4)})
    for exit_layer, colour in zip(shown, colours(shown), strict=True):
        when, values = by_exit[exit_layer]
        losses.plot(when, _smooth(values, len(steps)), color=colour, label=f"exit {exit_layer}")
        if evaluations:
            held_out = [row["loss_E"][exit_layer - 1] for row in evaluations]
            agreement = [row["agreement_E"][exit_layer - 1] for row in evaluations]
            seen = [row["step"] for row in evaluations]
            losses.plot(seen, held_out, color=colour, ls="", marker="o", ms=4)
            agreements.plot(seen, agreement, color=colour, marker="o", ms=4, label=exit_layer)
    if evaluations:
        losses.plot([], [], color=GREY, ls="", marker="o", ms=4, label="held out")
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    magnitudes(losses)  # a finetuning's exits begin at 20 and end at 0.1
    losses.legend(frameon=False)
    agreements.set(xlabel="step", ylabel="held out: agreement with the last exit", ylim=(0, 1.03))
    rates.plot(at, _numbers(steps, "grad_norm"), color=GREY, lw=0.8)
    rates.set(xlabel="step", ylabel="gradient norm", yscale="log")
    twin = rates.twinx()
    twin.plot(at, _numbers(steps, "learning_rate"), color=COLOURS[0])
    twin.set_ylabel("learning rate", color=COLOURS[0])
    twin.set_ylim(bottom=0)
    speed = _numbers(steps, "tokens") / _numbers(steps, "seconds")
    speeds.plot(at[1:], speed[1:], color=GREY, lw=0.6, alpha=0.6)  # the first step compiles
    speeds.plot(at[1:], _smooth(speed[1:], len(steps)), color=COLOURS[0])
    speeds.set(xlabel="step", ylabel="labelled tokens per second", ylim=(0, None))
    save(drawn, file, title)


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A column; what JSON does not have (null) is NaN, which is not drawn."""
    return np.array([row.get(name) for row in rows], float)


def _loss_by_exit(steps: Sequence[Mapping[str, Any]]) -> dict[int, tuple[list, np.ndarray]]:
    """Of each exit that was trained, the steps at which it was and its losses."""
    found: dict[int, list[tuple[int, Any]]] = {}
    for row in steps:
        for exit_layer, loss in zip(row["exits"], row["exit_losses"], strict=True):
            found.setdefault(exit_layer, []).append((row["step"], loss))
    return {
        exit_layer: ([step for step, _ in pairs], np.array([loss for _, loss in pairs], float))
        for exit_layer, pairs in found.items()
    }


def _nearest(exits: Iterable[int], wanted: float) -> int:
    return min(exits, key=lambda exit_layer: abs(exit_layer - wanted))


def _smooth(values: np.ndarray, steps: int) -> np.ndarray:
    """Means over the values around each; fewer at both ends."""
    if steps < 120:
        return values
    window = max(1, round(len(values) / 40))
    weights = np.ones(window)
    good = np.isfinite(values)
    total = np.convolve(np.where(good, values, 0), weights, "same")
    count = np.convolve(good.astype(float), weights, "same")
    return np.where(good, total / np.maximum(count, 1), np.nan)
