"""What all plots share: a figure that is nobody else's, legible colours, and one way to save.

Needs the `plots` extra (matplotlib).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lsjax.config import ConfigError

# Legible in print and to people who do not tell red from green (Okabe and Ito, 2008), the blue a
# little brighter than theirs for the sake of dark pages.
COLOURS = ("#2A85C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
GREY = "#AAAAAA"
DOTS_PER_INCH = 150
WIDE = 20  # times: from here on a linear axis draws the small as zero


def figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure and its array of axes, without pyplot's global state: plots are also made beside
    training. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'lsjax[plots]'") from None
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return drawn, axes


@contextmanager
def dark() -> Iterator[None]:
    """Plots made inside are bright on nothing: for dark pages."""
    import matplotlib

    bright = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    nothing = ("figure.facecolor", "axes.facecolor")
    changes = dict.fromkeys(bright, "#DDDDDD") | dict.fromkeys(nothing, "none")
    with matplotlib.rc_context(changes):
        yield


def check_plots() -> None:
    """Raises ConfigError where no plot can be made: better now than after the work."""
    figure(1, 1, (1, 1))


def colours(names: Collection) -> list[str]:
    """One for each name, the same again where there are many."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def whole_numbers(axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def magnitudes(axes) -> None:
    """A logarithmic y axis where what is drawn is positive and differs by more than WIDE."""
    low, high = axes.dataLim.intervaly
    if 0 < low * WIDE < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def save(drawn, file: Path | IO[bytes], title: str) -> None:
    """Writes a PNG, to a path or an open file."""
    if title:
        drawn.suptitle(title, parse_math=False)
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, dpi=DOTS_PER_INCH, format="png")
