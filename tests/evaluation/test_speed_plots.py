"""What a sweep's heat maps show."""

import dataclasses

import numpy as np
import pytest

from lsjax.evaluation.speed import Row
from lsjax.evaluation.speed_plots import best_row, heat_maps, plot_acceptance, plot_sweep


def row(exit_layer, drafts, vocab, speedup, curve=(0.5, 0.25)) -> Row:
    name = "autoregressive" if exit_layer is None else "self_speculative"
    speed = 10 * speedup
    figures = (speed, speed, speed, speedup, 0.4, list(curve), 1.8, 2.0, 0.5, speedup + 0.1)
    return Row(name, exit_layer, drafts, vocab, *figures)


ROWS = [
    row(None, None, None, 1.0, ()),
    row(8, 4, None, 1.5),
    row(2, 4, None, 1.2),
    row(2, 1, None, 1.4),
    row(2, 1, 64, 1.3),
    row(8, 4, 64, 2.5),
    row(8, 1, 64, 0.7),
]


def test_heat_maps():
    full, small = heat_maps(ROWS, lambda row: row.speedup)
    assert (full.draft_vocab, small.draft_vocab) == (None, 64)
    assert full.exit_layers == (2, 8) and full.num_draft_tokens == (1, 4)
    # A line for each exit, a column for each length.
    np.testing.assert_equal(full.values_Ed, [[1.4, 1.2], [np.nan, 1.5]])
    np.testing.assert_equal(small.values_Ed, [[1.3, np.nan], [0.7, 2.5]])
    assert full.best == (1, 1) and small.best == (1, 1)
    assert best_row(ROWS) is ROWS[5]
    assert best_row(ROWS[:1]) is None


def read_labels(figure) -> list[list[str]]:
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures that are saved, by hand of what they are saved with."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures


def test_where_nothing_was_drafted_there_is_no_acceptance(tmp_path, drawn):
    """Drafts that end before their first token, in every cell."""
    rows = [dataclasses.replace(row(8, 4, None, 0.9, ()), acceptance_rate=None)]
    plot_sweep(rows, tmp_path / "sweep.png")
    plot_acceptance(rows, tmp_path / "acceptance.png")
    assert read_labels(drawn[0]) == [["9.0\n0.90x"], ["1.00"], []]
    assert not drawn[1].axes[0].lines and drawn[1].axes[0].get_legend() is None


def test_pictures(tmp_path, drawn):
    plot_sweep(ROWS, tmp_path / "new" / "sweep.png", title="a <model> & $_$")
    plot_acceptance(ROWS, tmp_path / "acceptance.png")
    sweep, acceptance = drawn
    labels = read_labels(sweep)
    assert labels[0] == ["14.0\n1.40x", "12.0\n1.20x", "15.0\n1.50x"]
    assert labels[4] == ["1.40", "0.80", "2.60"]
    # One cell is framed among the speeds, one among the predictions, both of the second head.
    assert [len(axis.patches) for axis in sweep.axes] == [0, 0, 0, 1, 1, 0]
    assert sweep.axes[3].patches[0].get_xy() == (0.5, 0.5)
    curves = acceptance.axes[0].lines
    # The longest drafts of each exit and head, and a line in the legend for the dashed ones.
    assert [list(line.get_ydata()) for line in curves] == [[0.5, 0.25]] * 3 + [[]]
    for name in ("new/sweep.png", "acceptance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
