"""Plots of decoding: speeds of strategies, acceptance of drafts, and rounds of many rows."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from lsjax.config import AnyPath
from lsjax.evaluation.acceptance import Acceptance
from lsjax.evaluation.many_rows import ACCEPTANCES, RoundCost, fastest
from lsjax.evaluation.plots import COLOURS, DOTS, GREY, Row, figure
from lsjax.evaluation.scores import Cell

# Colours by the name of the strategy; a draft vocabulary or confidence has its own line of text.
SHADES = {
    "autoregressive": GREY,
    "early_exit": COLOURS[4],
    "self_speculative": COLOURS[0],
    "auto": COLOURS[2],
}


def plot_speeds(rows: Sequence[Row], file: AnyPath, *, title: str = "") -> None:
    """Speedups over autoregressive decoding with their intervals, beside the ideal ones.

    Each row has tokens per second and the acceptance at its side. The best speedup that is to be
    trusted is bold. Figures that are not have a question mark. rows: of `cell_speeds`.
    """
    order = [*SHADES]
    rows = sorted(rows, key=lambda row: (order.index(row["strategy"]), _numbers_of(row)))
    drafting = [row for row in rows if row["strategy"] in ("self_speculative", "auto")]
    best = max(drafting, key=lambda row: (row["trusted"], row["speedup"]), default=None)
    with figure(1, 1, (9, 1.2 + 0.32 * len(rows)), file, title) as ((axes,),):
        for place, row in enumerate(rows):
            colour, speedup = SHADES[row["strategy"]], row["speedup"]
            axes.barh(place, speedup, color=colour, alpha=0.85, height=0.66)
            if row["speedup_low"] is not None and row["strategy"] != "autoregressive":
                ends = row["speedup_low"], row["speedup_high"]
                axes.plot(ends, (place, place), color="#000000", lw=1.5)
            if row["ideal"] is not None:
                axes.plot(row["ideal"], place, marker="|", ms=13, mew=2, color=COLOURS[1])
            weight = "bold" if row is best else "normal"
            side = dict(transform=axes.get_yaxis_transform(), va="center", fontsize=9)
            axes.text(1.01, place, _figures(row), fontweight=weight, **side)
        names = [str(Cell.of(row)) for row in rows]
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        axes.axvline(1, color=GREY, lw=1)
        axes.set(xlabel="speedup over autoregressive decoding", xlim=(0, None))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        if any(row["ideal"] is not None for row in rows):
            style = dict(marker="|", ms=13, mew=2, color=COLOURS[1], ls="")
            axes.plot([], [], label="ideal, by bytes of weights", **style)
        if any(row["speedup_low"] is not None for row in rows):
            sources = {row.get("interval_of", "prompts") for row in rows}
            label = f"95% interval over {' and '.join(sorted(sources))}"
            axes.plot([], [], color="#000000", lw=1.5, label=label)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _numbers_of(row: Row) -> list[float]:
    names = ("draft_vocab", "draft_confidence", "exit_layer", "num_draft_tokens")
    return [row[name] or 0 for name in names]


def _figures(row: Row) -> str:
    """1.93x · 240.0 tokens/s · 0.71 accepted"""
    doubt = "" if row["trusted"] else "?"
    parts = [f"{row['speedup']:.2f}{doubt}x", f"{row['tokens_per_second']:,.1f}{doubt} tokens/s"]
    if row["acceptance_rate"] is not None:
        parts.append(f"{row['acceptance_rate']:.2f} accepted")
    return " · ".join(parts)


def plot_acceptance(found: Acceptance, file: AnyPath, *, title: str = "") -> None:
    """Share of drafted tokens that is accepted, by exit and position in the draft, with 95%
    intervals over the texts."""
    positions = np.arange(found.drafted_EJ.shape[1])
    with figure(1, 1, (10, 4), file, title) as ((axes,),):
        for exit_layer, colour in zip(found.exits, cycle(COLOURS), strict=False):
            at = [j for j in positions if found.drafted_EJ[found.exits.index(exit_layer), j]]
            own = [found.estimate(exit_layer, j) for j in at]
            numbers = np.array(at) + 1
            values = [one.value for one in own]
            axes.plot(numbers, values, color=colour, label=f"exit {exit_layer}", **DOTS)
            ends = [[one.low, one.high] for one in own]  # None, which is not drawn, for one text
            low, high = np.array(ends, float).reshape(-1, 2).T
            axes.fill_between(numbers, low, high, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="position in the draft", ylabel="share that is accepted", ylim=(0, 1.03))
        axes.set_xticks(positions + 1)
        axes.set_xlim(0.5, len(positions) + 0.5)
        axes.legend(frameon=False)


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
