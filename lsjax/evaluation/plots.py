"""Plots: every exit's loss and agreement, a run's curves, a benchmark's grid, and many rows.

Needs the `plots` extra (matplotlib). Every function writes one PNG.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np

from lsjax.config import AnyPath, check
from lsjax.evaluation import installed
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.many_rows import ACCEPTANCES, RoundCost, fastest
from lsjax.evaluation.scores import Cell
from lsjax.io.files import write_whole

Row = Mapping[str, Any]  # a line of a run's metrics.jsonl, or of a benchmark's cells.jsonl
# Legible in print and with red-green colour blindness (Okabe and Ito, 2008).
COLOURS = ("#2A85C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
GREY = "#AAAAAA"
DOTS = dict(marker="o", ms=4)


@contextmanager
def figure(
    rows: int, columns: int, size: tuple[float, float], file: AnyPath, title: str
) -> Iterator[np.ndarray]:
    """The axes of a figure, which is written as PNG at the end. Without pyplot's global state, as
    plots are also made during training. Raises ConfigError if matplotlib is not installed."""
    drawn = installed("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    yield axes
    drawn.suptitle(title, parse_math=False)
    content = io.BytesIO()
    drawn.savefig(content, dpi=150, format="png")
    write_whole(file, content.getvalue())


def plot_exits(scores: Mapping[str, ExitScores], file: AnyPath, *, title: str = "") -> None:
    """Loss and agreement with the final argmax by exit, by model (the paper's Figures 6 and 8).

    scores: by name in the legend; the models may have different numbers of layers.
    """
    with figure(1, 2, (10, 4), file, title) as ((losses, agreements),):
        for (name, score), colour in zip(scores.items(), cycle(COLOURS), strict=False):
            exits = range(1, len(score.loss_E) + 1)
            style = dict(label=name.replace("$", r"\$"), color=colour, **DOTS)
            losses.plot(exits, score.loss_E, **style)
            agreements.plot(exits, score.agreement_E, **style)
        losses.set(ylabel="loss (nats per token)")
        agreements.set(ylabel="agreement with the final argmax", ylim=(0, 1.03))
        for axes in (losses, agreements):
            axes.set(xlabel="exit (layers run)")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(scores) > 1:
            losses.legend(frameon=False)


def plot_training(metrics: Sequence[Row], file: AnyPath, *, title: str = "") -> None:
    """A run's losses by exit, held-out agreement, gradient norm with learning rate, and speed.

    metrics: lines of metrics.jsonl. Raises ConfigError if they contain no steps.
    """
    steps = [row for row in metrics if row.get("kind") == "step"]
    evaluations = [row for row in metrics if row.get("kind") == "evaluation"]
    check(bool(steps), "there are no steps to plot: give the metrics.jsonl of a run that started")
    with figure(2, 2, (11, 7), file, title) as ((losses, agreements), (rates, speeds)):
        at = _numbers(steps, "step")
        losses.plot(at, _numbers(steps, "last_exit_loss"), color=GREY, lw=0.6, alpha=0.6)
        by_exit: dict[int, list[tuple[int, float | None]]] = {}
        for row in steps:
            for exit_layer, loss in zip(row["exits"], row["exit_losses"], strict=True):
                by_exit.setdefault(exit_layer, []).append((row["step"], loss))
        quarters = (max(by_exit) * share / 4 for share in (1, 2, 3, 4))
        shown = sorted({min(by_exit, key=lambda exit_: abs(exit_ - at)) for at in quarters})
        seen = _numbers(evaluations, "step")
        for exit_layer, colour in zip(shown, COLOURS, strict=False):
            when, values = np.array(by_exit[exit_layer], float).T
            losses.plot(when, _smooth(values), color=colour, label=f"exit {exit_layer}")
            held_out = [row["loss_E"][exit_layer - 1] for row in evaluations]
            agreement = [row["agreement_E"][exit_layer - 1] for row in evaluations]
            losses.plot(seen, held_out, color=colour, ls="", **DOTS)
            agreements.plot(seen, agreement, color=colour, label=exit_layer, **DOTS)
        if evaluations:
            losses.plot([], [], color=GREY, ls="", label="held out", **DOTS)
        losses.set(xlabel="step", ylabel="loss (nats per token)")
        low, high = losses.dataLim.intervaly
        if 0 < 20 * low < high:  # exits that finetuning improves a lot
            losses.set_yscale("log")
            losses.yaxis.set_major_formatter("{x:g}")
        losses.legend(frameon=False)
        agreements.set(xlabel="step", ylabel="held-out agreement with last exit", ylim=(0, 1.03))
        rates.plot(at, _numbers(steps, "grad_norm"), color=GREY, lw=0.8)
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


def plot_grid(rows: Sequence[Row], file: AnyPath, *, title: str = "") -> None:
    """Heat maps of the speedup over exits and draft lengths, one for each head and confidence.

    Each cell has tokens per second, the speedup and the acceptance rate (if anything was drafted).
    The best speedup is framed. Figures that are not to be trusted have a question mark. rows: lines
    of strategies that draft.
    """
    order = ("draft_vocab", "draft_confidence", "exit_layer", "num_draft_tokens")
    maps: dict[Cell, list[Row]] = {}
    for row in sorted(rows, key=lambda row: [row[name] or 0 for name in order]):
        kind = Cell.of(row)._replace(exit_layer=None, num_draft_tokens=None)
        maps.setdefault(kind, []).append(row)
    exits = sorted({row["exit_layer"] for row in rows})
    lengths = sorted({row["num_draft_tokens"] for row in rows})
    best = max(rows, key=lambda row: (row["trusted"], row["speedup"]))
    speedups = [row["speedup"] for row in rows]
    low, high = min(speedups), max(speedups)
    size = max(7, 1.2 * len(lengths) + 1.4), len(maps) * max(2.6, 0.7 * len(exits) + 1.2)
    with figure(len(maps), 1, size, file, title) as axes:
        for (kind, own), axis in zip(maps.items(), axes.flat, strict=True):
            shown = np.full((len(exits), len(lengths)), np.nan)
            for row in own:
                i, j = exits.index(row["exit_layer"]), lengths.index(row["num_draft_tokens"])
                shown[i, j] = row["speedup"]
                doubt = "" if row["trusted"] else "?"
                words = f"{row['tokens_per_second']:,.1f}{doubt} tokens/s\n"
                words += f"{row['speedup']:.2f}{doubt}x"
                if row["acceptance_rate"] is not None:
                    words += f"\n{row['acceptance_rate']:.2f} accepted"
                colour = "white" if row["speedup"] <= low + 0.55 * (high - low) else "black"
                axis.text(j, i, words, fontsize=8, color=colour, ha="center", va="center")
                if row is best:
                    style = dict(fill=False, edgecolor=COLOURS[1], linewidth=3.5, clip_on=False)
                    patches = installed("matplotlib.patches", "plots")
                    axis.add_patch(patches.Rectangle((j - 0.5, i - 0.5), 1, 1, **style))
            axis.imshow(shown, vmin=low, vmax=high, aspect="auto", origin="lower")
            axis.grid(False)
            axis.spines[:].set_visible(False)
            axis.set_xticks(range(len(lengths)), lengths)
            axis.set_yticks(range(len(exits)), exits)
            axis.set(xlabel="draft length d", ylabel="exit E")
            axis.set_title(str(kind), fontsize="medium")


def plot_rows(costs: Mapping[str, Sequence[RoundCost]], file: AnyPath, *, title: str = "") -> None:
    """Speedup over the number of rows at assumed acceptances, in a panel for each machine. Each
    point is the best exit and draft length, and names the length.

    costs: by the name of the machine.
    """
    size = 1 + 4 * len(costs), 4
    with figure(1, len(costs), size, file, title) as ((first, *_),):
        for axes, (name, own) in zip(first.figure.axes, costs.items(), strict=True):
            rows = sorted({cost.rows for cost in own})
            for acceptance, colour in zip(ACCEPTANCES, COLOURS, strict=False):
                best = [fastest((c for c in own if c.rows == one), acceptance) for one in rows]
                speedups = [cost.speedup(acceptance) for cost in best]
                axes.plot(rows, speedups, color=colour, label=f"acceptance {acceptance}", **DOTS)
                for cost, speedup in zip(best, speedups, strict=True):
                    style = dict(textcoords="offset points", xytext=(0, 5), ha="center", fontsize=8)
                    axes.annotate(f"d = {cost.num_draft_tokens}", (cost.rows, speedup), **style)
            axes.axhline(1, color=GREY, lw=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(rows, rows)
            axes.set(xlabel="rows")
            axes.set_title(name, fontsize="medium", parse_math=False)
            axes.margins(x=0.1, y=0.12)
        first.set(ylabel="speedup over autoregressive decoding")
        lines = first.get_legend_handles_labels()
        first.figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False)
