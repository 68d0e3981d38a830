"""Draws one round of self-speculation, docs/round.png (needs the plots extra).

python scripts/draw_round.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).parents[1] / "docs" / "round.png"
DRAFT, VERIFY, IDLE = "#9ecae9", "#f5b971", "#eeeeee"
GREEN, RED, BLUE, GREY = "#2a8c3f", "#c0392b", "#2457a7", "#777777"
TOKENS = ["the", "cat", "sat", "on"]  # the pending token and three drafts
JUDGED = ["cat", "sat", "by", ""]  # what the whole model says after each
LAYERS, EXIT = 8, 2


def main() -> int:
    """Draws the two passes beside each other."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    titles = (
        f"Draft: layers 1 to {EXIT}, one token after the other",
        f"Verify: layers {EXIT + 1} to {LAYERS}, all tokens at once",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlim=(-0.9, 4.3), ylim=(-1.5, 11.6), title=title)
        axis.axis("off")
        for layer in range(LAYERS):
            axis.text(-0.2, layer + 0.5, f"{layer + 1}", ha="right", va="center", color=GREY)
        axis.text(-0.62, LAYERS / 2, "layer", rotation=90, ha="center", va="center", color=GREY)
    draft, verify = axes
    for column, token in enumerate(TOKENS):
        last = column == len(TOKENS) - 1
        for layer in range(LAYERS):
            early = layer < EXIT
            _box(draft, column, layer, DRAFT if early else IDLE)
            _box(verify, column, layer, IDLE if early else VERIFY)
        for axis in axes:
            colour = BLUE if column == 0 else "black"
            axis.text(column + 0.5, -0.55, token, ha="center", va="center", color=colour, size=13)
        if last:
            continue
        following = TOKENS[column + 1]
        # The head reads the exit's output, and what it says is the next token to go in.
        draft.annotate(
            "", (column + 0.5, 8.9), (column + 0.5, EXIT + 0.05), arrowprops=_arrow(GREY)
        )
        draft.text(column + 0.5, 9.25, following, ha="center", va="center", size=13)
        draft.annotate(
            "",
            (column + 1.36, -0.2),
            (column + 0.72, 9.0),
            arrowprops={**_arrow(GREY), "connectionstyle": "arc3,rad=-0.12", "linestyle": ":"},
        )
        stands = JUDGED[column] == following
        verify.annotate(
            "", (column + 0.5, 8.9), (column + 0.5, LAYERS + 0.05), arrowprops=_arrow(GREY)
        )
        verify.text(
            column + 0.5,
            9.25,
            JUDGED[column],
            ha="center",
            va="center",
            size=13,
            weight="bold",
            color=GREEN if stands else RED,
        )
        word = "accepted" if stands else f"not “{following}”:\ncorrected"
        verify.text(
            column + 0.5,
            10.2,
            word,
            ha="center",
            va="center",
            size=8,
            color=GREEN if stands else RED,
        )
    verify.text(3.5, 9.25, "–", ha="center", va="center", size=13, color=GREY)
    verify.text(3.5, 10.2, "dropped", ha="center", va="center", size=8, color=GREY)
    draft.text(2, 10.35, "shared head, on the exit's output", ha="center", color=GREY, size=9)
    verify.text(2, 11.1, "shared head, on the last layer's output", ha="center", color=GREY, size=9)
    verify.text(
        2,
        -1.35,
        "what the draft left in cache and exit states is read, not computed again",
        ha="center",
        color=GREY,
        size=9,
    )
    draft.text(2, -1.35, "“the” is known; “cat sat on” is drafted", ha="center", color=GREY, size=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)
    return 0


def _box(axis, column: int, layer: int, colour: str) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (column + 0.1, layer + 0.1),
            0.8,
            0.8,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor="white",
        )
    )


def _arrow(colour: str) -> dict:
    return {"arrowstyle": "-|>", "color": colour, "lw": 1}


if __name__ == "__main__":
    sys.exit(main())
