"""Pictures of a sweep over exits and draft lengths: heat maps, and acceptance by draft position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float

from lsjax.evaluation.figures import GREY, colours, figure, save, whole_numbers
from lsjax.evaluation.speed import Row


@dataclass(frozen=True)
class HeatMap:
    """A figure of every cell of a grid, for the full head (draft_vocab None) or a draft vocabulary;
    NaN where a cell was not measured."""

    draft_vocab: int | None
    exit_layers: tuple[int, ...]
    num_draft_tokens: tuple[int, ...]
    values_Ed: Float[np.ndarray, "E d"]

    @property
    def best(self) -> tuple[int, int]:
        """Index of the largest value."""
        return np.unravel_index(np.nanargmax(self.values_Ed), self.values_Ed.shape)


def heat_maps(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[HeatMap]:
    """The rows that draft as a map for each head, the full one first; exits and lengths rise."""
    drafting = [row for row in rows if row.num_draft_tokens is not None]
    exits = sorted({row.exit_layer for row in drafting})
    lengths = sorted({row.num_draft_tokens for row in drafting})
    heads = sorted({row.draft_vocab for row in drafting}, key=lambda n: (n is not None, -(n or 0)))
    maps = []
    for head in heads:
        values_Ed = np.full((len(exits), len(lengths)), np.nan)
        for row in drafting:
            if row.draft_vocab == head and (figure_of := value(row)) is not None:
                at = exits.index(row.exit_layer), lengths.index(row.num_draft_tokens)
                values_Ed[at] = figure_of
        maps.append(HeatMap(head, tuple(exits), tuple(lengths), values_Ed))
    return maps


def best_row(rows: Sequence[Row]) -> Row | None:
    """The cell with the highest speedup; None where nothing drafts."""
    return max(
        (row for row in rows if row.num_draft_tokens is not None),
        key=lambda row: row.speedup,
        default=None,
    )


def plot_sweep(rows: Sequence[Row], file: Path | IO[bytes], *, title: str = "") -> None:
    """Tokens per second with the speedup, what the cost model predicts of it, and the acceptance
    rate of every cell; a line of maps for each head. The best cell of a kind is framed."""
    speeds = heat_maps(rows, lambda row: row.tokens_per_second)
    kinds = {
        "tokens/s (speedup)": (speeds, heat_maps(rows, lambda row: row.speedup)),
        "predicted speedup": (heat_maps(rows, lambda row: row.predicted),) * 2,
        "acceptance rate": (heat_maps(rows, lambda row: row.acceptance_rate),) * 2,
    }
    high, wide = speeds[0].values_Ed.shape
    size = (3 * max(3.2, 0.75 * wide + 1.4), len(speeds) * max(2.6, 0.5 * high + 1.2))
    drawn, axes = figure(len(speeds), 3, size)
    for column, (name, (maps, coloured_by)) in enumerate(kinds.items()):
        everything = np.stack([one.values_Ed for one in coloured_by])
        # An acceptance rate is a share of 1 (and none where nothing was drafted); a speed is best
        # told from the others of the sweep, and the best one is marked.
        low, top, marked = 0, 1, ()
        if column < 2:
            low, top = np.nanmin(everything), np.nanmax(everything)
            marked = np.unravel_index(np.nanargmax(everything), everything.shape)
        for line, (shown, colour) in enumerate(zip(maps, coloured_by, strict=True)):
            axis = axes[line, column]
            mark = marked[1:] if marked and marked[0] == line else None
            _draw(axis, colour, low, top, mark)
            head = f"drafts from {shown.draft_vocab} tokens" if shown.draft_vocab else "full head"
            axis.set_title(f"{name}, {head}" if len(speeds) > 1 else name, fontsize="medium")
            for (i, j), value in np.ndenumerate(shown.values_Ed):
                text = f"{value:.2f}"
                if column == 0:
                    digits = 0 if value >= 1000 else 1
                    text = f"{value:,.{digits}f}\n{colour.values_Ed[i, j]:.2f}x"
                _label(axis, i, j, text, colour.values_Ed[i, j], low, top)
    save(drawn, file, title)


def _draw(axis, shown: HeatMap, low: float, top: float, mark: tuple[int, int] | None) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(shown.values_Ed, cmap="viridis", vmin=low, vmax=top, aspect="auto", origin="lower")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_xticks(range(len(shown.num_draft_tokens)), shown.num_draft_tokens)
    axis.set_yticks(range(len(shown.exit_layers)), shown.exit_layers)
    axis.set(xlabel="draft length d", ylabel="exit E")
    if mark is not None:
        corner = (mark[1] - 0.5, mark[0] - 0.5)
        axis.add_patch(
            Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=3.5, clip_on=False)
        )


def _label(axis, i: int, j: int, text: str, value: float, low: float, top: float) -> None:
    """Dark on bright cells, bright on dark ones."""
    if np.isnan(value):
        return
    bright = top > low and (value - low) / (top - low) > 0.55
    axis.text(
        j, i, text, ha="center", va="center", fontsize=8, color="black" if bright else "white"
    )


def plot_acceptance(rows: Sequence[Row], file: Path | IO[bytes], *, title: str = "") -> None:
    """Share of the drafts at each position that were accepted, by exit, for its longest drafts;
    dashed with a draft vocabulary. Behind a refused draft none is accepted, so the curve falls."""
    drafting = [row for row in rows if row.acceptance_by_position]
    exits = sorted({row.exit_layer for row in drafting})
    drawn, ((axis,),) = figure(1, 1, (6, 3.8))
    for exit_layer, colour in zip(exits, colours(exits), strict=True):
        own = [row for row in drafting if row.exit_layer == exit_layer]
        longest = max(row.num_draft_tokens for row in own)
        for row in own:
            if row.num_draft_tokens == longest:
                style = (
                    {"ls": "--", "lw": 1} if row.draft_vocab else {"label": f"exit {exit_layer}"}
                )
                positions = range(1, 1 + len(row.acceptance_by_position))
                axis.plot(
                    positions, row.acceptance_by_position, color=colour, marker="o", ms=3, **style
                )
    axis.set(xlabel="position in the draft", ylabel="accepted", ylim=(0, 1.03))
    whole_numbers(axis)
    vocabularies = sorted({row.draft_vocab for row in drafting if row.draft_vocab})
    if vocabularies:
        label = f"drafts from {' or '.join(map(str, vocabularies))} tokens"
        axis.plot([], [], color=GREY, ls="--", lw=1, label=label)
    if drafting:
        axis.legend(frameon=False)
    save(drawn, file, title)
