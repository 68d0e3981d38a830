"""What the bars of strategies, the acceptance of drafts and the rounds of many rows show."""

import numpy as np
import pytest

from lsjax.evaluation.acceptance import Acceptance
from lsjax.evaluation.many_rows import RoundCost
from lsjax.evaluation.scores import Cell
from lsjax.evaluation.speed_plots import plot_acceptance, plot_rows, plot_speeds
from tests.evaluation.test_plots import lines


def row(strategy, exit_layer, drafts, speedup, **more) -> dict:
    cell = Cell(strategy, exit_layer, drafts)._asdict()
    figures = {"tokens_per_second": 10 * speedup, "speedup": speedup, "ideal": None}
    ends = {"speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
    return cell | figures | ends | {"acceptance_rate": 0.4, "trusted": True} | more


ROWS = [
    row("auto", None, None, 1.9),
    row("self_speculative", 8, 4, 1.5, ideal=1.7),
    row("self_speculative", 2, 4, 7.0, trusted=False),
    row("autoregressive", None, None, 1.0, acceptance_rate=None),
    row("early_exit", 8, None, 2.5, acceptance_rate=None, speedup_low=None, speedup_high=None),
]


def test_bars_of_all_strategies(drawn, tmp_path):
    """The baseline first and auto last. Doubtful figures have a question mark and are not best."""
    plot_speeds(ROWS, tmp_path / "plot.png", title="a <model> & $_$")
    (axes,) = drawn[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "autoregressive",
        "early exit, exit 8",
        "self speculative, exit 2, 4 drafts",
        "self speculative, exit 8, 4 drafts",
        "auto",
    ]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 2.5, 7.0, 1.5, 1.9]
    assert [text.get_text() for text in axes.texts] == [
        "1.00x · 10.0 tokens/s",
        "2.50x · 25.0 tokens/s",
        "7.00?x · 70.0? tokens/s · 0.40 accepted",
        "1.50x · 15.0 tokens/s · 0.40 accepted",
        "1.90x · 19.0 tokens/s · 0.40 accepted",
    ]
    assert [text.get_fontweight() for text in axes.texts] == [*["normal"] * 4, "bold"]
    assert axes.get_xlim()[0] == 0
    intervals = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(intervals[:3], [[6.9, 7.1], [1.4, 1.6], [1.8, 2.0]])
    assert [1.7] in [list(np.atleast_1d(line.get_xdata())) for line in axes.lines]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_one_strategy_without_drafts(drawn, tmp_path):
    plot_speeds([ROWS[3]], tmp_path / "plot.png")
    assert len(drawn[0].axes[0].patches) == 1


def test_acceptance(drawn, tmp_path):
    """Positions that an exit never drafted are left out."""
    drafted, accepted = np.zeros((2, 3, 2, 2), int)
    drafted[:] = [[4, 2], [3, 0]]
    accepted[:] = [[3, 1], [3, 0]]
    plot_acceptance(Acceptance((2, 4), drafted, accepted), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    found = lines(axes)
    assert found["exit 2"] == [(1, 0.75), (2, 0.5)] and found["exit 4"] == [(1, 1.0)]
    assert list(axes.get_xticks()) == [1, 2] and axes.get_ylim() == (0, pytest.approx(1.03))


def test_many_rows(tmp_path, drawn):
    """A panel for each machine, a line for each acceptance, and the best length at each point."""
    costs = [RoundCost(rows, 2, d, 1.0, rows * s) for rows in (1, 2) for d, s in ((1, 1), (4, 2))]
    plot_rows({"a $_$": costs, "b": costs[:2]}, tmp_path / "rows.png", title="rows")
    (figure,) = drawn
    first, second = figure.axes
    # Acceptance 0.5: 1.5 tokens in 1 and 2 s beat 1.94 in 2 and 4 s. 0.9: 4.10 beats 1.9.
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[1, 1.5], [2, 0.75]])
    np.testing.assert_allclose(first.lines[2].get_ydata(), [4.0951 / 2, 4.0951 / 4])
    assert [text.get_text() for text in first.texts][::2] == ["d = 1", "d = 1", "d = 4"]
    assert len(second.lines[0].get_xydata()) == 1
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
