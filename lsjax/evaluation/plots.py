"""Plots of a model: loss and agreement of every exit, and the curves of a training.

They need the `plots` extra (matplotlib). Every function writes one file, .png or .svg. In an SVG,
text and axes have the colour of the text around it (currentColor), on no background.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np

from lsjax.config import AnyPath, check
from lsjax.evaluation import installed
from lsjax.evaluation.intervals import Estimate
from lsjax.io.files import write_whole

Row = Mapping[str, Any]  # a line of a run's metrics.jsonl, or of a benchmark's cells.jsonl
# Legible in print and with red-green colour blindness (Okabe and Ito, 2008).
COLOURS = ("#2A85C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
GREY = "#AAAAAA"
DOTS = dict(marker="o", ms=4)
SVG = {"svg.fonttype": "none", "svg.hashsalt": "lsjax"}  # text stays text; equal plots, equal files


@contextmanager
def figure(
    rows: int, columns: int, size: tuple[float, float], file: AnyPath, title: str
) -> Iterator[np.ndarray]:
    """The axes of a figure, which is written at the end. Without pyplot's global state, as plots
    are also made during training. Raises ConfigError if matplotlib is not installed."""
    drawn = installed("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    yield axes
    if title:
        drawn.suptitle(title, parse_math=False)
    content = io.BytesIO()
    if file.suffix != ".svg":
        drawn.savefig(content, dpi=150, format="png")
        write_whole(file, content.getvalue())
        return
    with installed("matplotlib", "plots").rc_context(SVG):
        drawn.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    whole = content.getvalue().decode()
    svg = whole[whole.index("<svg") :].replace("#000000", "currentColor")
    write_whole(file, svg.replace("<svg ", '<svg fill="currentColor" ', 1).encode())


def estimates(values_E: Sequence[float]) -> list[Estimate]:
    """Figures of exits without intervals."""
    return [Estimate(value) for value in values_E]


def plot_exits(
    losses: Mapping[str, Sequence[Estimate]],
    agreements: Mapping[str, Sequence[Estimate]],
    file: AnyPath,
    *,
    trained: Sequence[int] = (),
    title: str = "",
) -> None:
    """Loss and agreement with the final argmax by exit, by model (the paper's Figures 6 and 8).

    losses, agreements: of exits 1, 2 and so on, by name in the legend; the models may have
    different numbers of layers. Intervals are shaded. trained: exits with a loss, which are marked.
    """
    with figure(1, 2, (10, 4), file, title) as ((loss_axes, agreement_axes),):
        for by_name, axes in ((losses, loss_axes), (agreements, agreement_axes)):
            for exit_layer in trained:
                axes.axvline(exit_layer, color=GREY, lw=5, alpha=0.35, zorder=0)
            for (name, found), colour in zip(by_name.items(), cycle(COLOURS), strict=False):
                exits = range(1, len(found) + 1)
                values = [one.value for one in found]
                axes.plot(exits, values, label=escaped(name), color=colour, **DOTS)
                if found[0].low is not None:
                    low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
                    axes.fill_between(exits, low, high, color=colour, alpha=0.2, lw=0)
            axes.set(xlabel="exit (layers run)")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if trained:
            words = f"exit{'s' * (len(trained) > 1)} with a loss in training"
            loss_axes.plot([], [], color=GREY, lw=5, alpha=0.35, label=words)
        loss_axes.set(ylabel="held-out loss (nats per token)")
        loss_axes.set_title("loss", fontsize="medium")
        widened(loss_axes)
        agreement_axes.set(ylabel="share of tokens", ylim=(0, 1.03))
        agreement_axes.set_title("agreement with the last exit's choice", fontsize="medium")
        loss_axes.legend(frameon=False)


def escaped(name: str) -> str:
    """A name for a legend, in which $ would begin a formula."""
    return name.replace("$", r"\$")


def widened(axes: Any, fewest: float = 0.2) -> None:
    """Shows at least `fewest` units, so that small differences look small."""
    low, high = axes.get_ylim()
    if high - low < fewest:
        middle = (low + high) / 2
        axes.set_ylim(middle - fewest / 2, middle + fewest / 2)


def plot_training(metrics: Sequence[Row], file: AnyPath, *, title: str = "") -> None:
    """A run's losses by exit, held-out agreement, gradient norm with learning rate, and speed.

    metrics: lines of metrics.jsonl. Raises ConfigError if they contain no steps.
    """
    steps = [row for row in metrics if row.get("kind") == "step"]
    evaluations = [row for row in metrics if row.get("kind") == "evaluation"]
    check(bool(steps), "there are no steps to plot: give the metrics.jsonl of a run that started")
    with figure(2, 2, (11, 7), file, title) as ((losses, agreements), (rates, speeds)):
        at = _numbers(steps, "step")
        name = "last_exit_loss" if "last_exit_loss" in steps[0] else "loss"  # of exit blocks
        losses.plot(at, _numbers(steps, name), color=GREY, lw=0.6, alpha=0.6)
        plot_losses(losses, agreements, steps, evaluations)
        rates.plot(at, _numbers(steps, "grad_norm"), color=GREY, lw=0.8, label="gradient norm")
        rates.set(xlabel="step", ylabel="gradient norm", yscale="log")
        learning_rates = _numbers(steps, "learning_rate")
        if np.isfinite(learning_rates).any():  # an optimizer of one's own may not tell it
            twin = rates.twinx()
            twin.plot(at, learning_rates, color=COLOURS[0])
            twin.set_ylabel("learning rate", color=COLOURS[0])
            twin.set_ylim(bottom=0)
        tokens, seconds = _numbers(steps, "tokens"), _numbers(steps, "seconds")
        tokens[0] = seconds[0] = np.nan  # the first step compiles

        def speed(fewest: int) -> np.ndarray:
            """Over several steps: two may share their time unevenly, if the program waited."""
            return _smooth(tokens, fewest) / _smooth(seconds, fewest)

        speeds.plot(at, speed(3), color=GREY, lw=0.6, alpha=0.6)
        speeds.plot(at, speed(9), color=COLOURS[0])
        speeds.set(xlabel="step", ylabel="labelled tokens per second", ylim=(0, None))
        names = ("loss by exit", "held-out agreement", "gradient and learning rate", "speed")
        for axes, name in zip((losses, agreements, rates, speeds), names, strict=True):
            axes.set_title(name, fontsize="medium")
            axes.set_xlim(min(0, at[0]), at[-1] * 1.02)


def plot_losses(
    losses: Any,
    agreements: Any,
    steps: Sequence[Row],
    evaluations: Sequence[Row],
    exits: Sequence[int] = (),
) -> None:
    """Losses and held-out agreement of each exit with a loss in training, on two axes. exits:
    others that are shown as well."""
    by_exit: dict[int, list[tuple[int, float | None]]] = {}
    for row in steps:
        for exit_layer, loss in zip(row["exits"], row["exit_losses"], strict=True):
            by_exit.setdefault(exit_layer, []).append((row["step"], loss))
    shown = sorted({*by_exit, *exits})
    # Many exits have neighbouring shades, and some of them names.
    shades: Sequence[Any] = COLOURS
    if len(shown) > len(COLOURS):
        colours = installed("matplotlib", "plots").colormaps["viridis"]
        shades = colours(np.linspace(0, 0.9, len(shown)))
    named = {shown[round(at)] for at in np.linspace(0, len(shown) - 1, min(len(shown), 7))}
    seen = _numbers(evaluations, "step")
    for exit_layer, colour in zip(shown, shades, strict=False):
        when, values = np.array(by_exit.get(exit_layer, [(np.nan, np.nan)]), float).T
        label = f"exit {exit_layer}" if exit_layer in named else None
        losses.plot(when, _smooth(values), color=colour, label=label)
        held_out = [row["loss_E"][exit_layer - 1] for row in evaluations]
        agreement = [row["agreement_E"][exit_layer - 1] for row in evaluations]
        losses.plot(seen, held_out, color=colour, ls="", **DOTS)
        agreements.plot(seen, agreement, color=colour, label=label, **DOTS)
    if evaluations:
        losses.plot([], [], color=GREY, ls="", label="held out", **DOTS)
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    low, high = losses.dataLim.intervaly
    if 0 < 20 * low < high:  # exits that finetuning improves a lot
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:g}")
    losses.legend(frameon=False)
    agreements.set(xlabel="step", ylabel="share of tokens", ylim=(0, 1.03))
    agreements.legend(frameon=False)


def _numbers(rows: Sequence[Row], name: str) -> np.ndarray:
    """A column of numbers; null becomes NaN, which is not drawn."""
    return np.array([row.get(name) for row in rows], float)


def _smooth(values: np.ndarray, fewest: int = 1) -> np.ndarray:
    """Moving average over a fortieth of the values, or over `fewest`; over fewer at both ends."""
    weights = np.ones(min(len(values), max(fewest, round(len(values) / 40))))
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0), weights, "same")
    counts = np.convolve(known, weights, "same")
    return np.where(known, totals / np.maximum(counts, 1), np.nan)
