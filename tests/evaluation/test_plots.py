"""What the curves of a training and the heat maps of a grid show."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lsjax.config import ConfigError
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.many_rows import RoundCost
from lsjax.evaluation.plots import plot_exits, plot_grid, plot_rows, plot_training
from lsjax.evaluation.scores import Cell


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures


def step(number: int, exits: list[int]) -> dict:
    loss = None if number == 2 else 4.0 - number / 10
    return {
        "kind": "step",
        "step": number,
        "last_exit_loss": loss,
        "exits": exits,
        "exit_losses": [5.0 - number / 10] * (len(exits) - 1) + [loss],
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "tokens": 100,
        "seconds": 50.0 if number == 1 else 0.5,
    }


METRICS = [step(1, [1, 4]), step(2, [2, 4]), step(3, [1, 4])] + [
    {"kind": "evaluation", "step": 3, "loss_E": [4, 3, 2, 1], "agreement_E": [0.1, 0.2, 0.3, 1]},
    {"kind": "sample", "step": 3, "text": "x"},
]


def lines(axis) -> dict[str, list]:
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def test_training(drawn, tmp_path):
    file = tmp_path / "training.png"
    plot_training(METRICS, file, title="a $run")
    assert file.read_bytes().startswith(b"\x89PNG")
    losses, agreements, _, speeds, *_ = drawn[0].axes
    found = lines(losses)
    # Exit 3 was never trained, so that the nearest stand for the quarters; a null is a gap.
    assert list(found) == ["exit 1", "exit 2", "exit 4", "held out"]
    assert found["exit 1"] == [(1, 4.9), (3, 4.7)]
    np.testing.assert_equal(found["exit 4"], [(1, 3.9), (2, np.nan), (3, 3.7)])
    assert lines(agreements) == {"1": [(3, 0.1)], "2": [(3, 0.2)], "4": [(3, 1)]}
    # Without the first step, which compiles.
    np.testing.assert_equal(speeds.lines[-1].get_ydata(), [np.nan, 200, 200])


def test_steps_that_share_their_time_are_no_peak(drawn, tmp_path):
    rows = [step(number, [1, 4]) for number in range(1, 21)]
    rows[7]["seconds"], rows[8]["seconds"] = 0.996, 0.004
    plot_training(rows, tmp_path / "plot.png")
    each, smooth = (line.get_ydata()[1:] for line in drawn[0].axes[3].lines)
    assert each.max() < 300 and smooth.max() < 225
    np.testing.assert_allclose(each[[0, 4, 10, -1]], 200)


def test_a_run_that_has_just_begun(drawn, tmp_path):
    plot_training(METRICS[:1], tmp_path / "plot.png")
    assert lines(drawn[0].axes[0])["exit 4"] == [(1, 3.9)]


@pytest.mark.parametrize(("last", "scale"), [(0.1, "log"), (1.0, "linear"), (0.0, "linear")])
def test_losses_of_several_magnitudes(drawn, last, scale, tmp_path):
    rows = [step(1, [1, 4]), step(3, [1, 4]) | {"last_exit_loss": last}]
    plot_training(rows, tmp_path / "plot.png")
    assert drawn[0].axes[0].get_yscale() == scale


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ConfigError, match="there are no steps to plot"):
        plot_training(METRICS[3:], tmp_path / "plot.png")


def test_smooth_curves_of_long_runs(drawn, tmp_path):
    """Means over a fortieth of the steps, over fewer at the ends."""
    rows = [step(number, [1, 4]) for number in range(1, 201)]
    rows[100]["last_exit_loss"] = rows[100]["exit_losses"][-1] = 1000.0
    plot_training(rows, tmp_path / "plot.png")
    curve = np.array(lines(drawn[0].axes[0])["exit 4"])[:, 1]
    plain = 4.0 - np.arange(1, 201) / 10
    np.testing.assert_allclose(curve[5:95], plain[5:95], atol=1e-12)
    np.testing.assert_allclose(curve[98:103], plain[98:103] + (1000 - plain[100]) / 5, atol=1e-12)
    np.testing.assert_allclose(curve[-1], plain[-3:].mean(), atol=1e-12)


def test_exits_of_several_models(drawn, tmp_path):
    scores = {
        "with $x$": ExitScores((3.0, 2.0), (0.5, 1.0), 9),
        "without": ExitScores((4.0, 3.0, 2.0), (0.1, 0.5, 1.0), 9),
    }
    plot_exits(scores, tmp_path / "plot.png")
    losses, agreements = drawn[0].axes
    assert lines(losses) == {
        r"with \$x\$": [(1, 3.0), (2, 2.0)],
        "without": [(1, 4.0), (2, 3.0), (3, 2.0)],
    }
    assert lines(agreements)["without"] == [(1, 0.1), (2, 0.5), (3, 1.0)]


def row(exit_layer, drafts, vocab, speedup, confidence=None) -> dict:
    figures = {"tokens_per_second": 10 * speedup, "speedup": speedup}
    cell = Cell("self_speculative", exit_layer, drafts, vocab, confidence)
    return cell._asdict() | figures | {"acceptance_rate": 0.4, "trusted": True}


ROWS = [
    row(8, 4, None, 1.5),
    row(2, 4, None, 1.2),
    row(2, 1, None, 1.4),
    row(2, 1, 64, 1.3),
    row(8, 4, 64, 2.5),
    row(8, 1, 64, 0.7),
]


def read_labels(figure) -> list[list[str]]:
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


def test_where_nothing_was_drafted_there_is_no_acceptance(drawn, tmp_path):
    """Drafts that end before their first token, in every cell."""
    plot_grid([row(8, 4, None, 0.9) | {"acceptance_rate": None}], tmp_path / "plot.png")
    assert read_labels(drawn[0]) == [["9.0 tokens/s\n0.90x"]]


def test_doubtful_figures_have_a_question_mark(drawn, tmp_path):
    """They are not the best, and the colours still cover them."""
    doubtful = row(8, 1, None, 7.0) | {"trusted": False}
    plot_grid([row(8, 4, None, 1.5), doubtful], tmp_path / "plot.png")
    assert read_labels(drawn[0])[0][0] == "70.0? tokens/s\n7.00?x\n0.40 accepted"
    (axis,) = drawn[0].axes
    assert axis.patches[0].get_xy() == (0.5, -0.5) and axis.images[0].get_clim() == (1.5, 7.0)


def test_a_grid(tmp_path, drawn):
    """A line for each exit, a column for each length, a map for each head and confidence."""
    sure = row(8, 4, 64, 2.2, confidence=0.5)
    plot_grid([*ROWS, sure], tmp_path / "grid.png", title="a <model> & $_$")
    (grid,) = drawn
    labels = read_labels(grid)
    words = [f"{10 * times:.1f} tokens/s\n{times:.2f}x\n0.40 accepted" for times in (1.4, 1.2, 1.5)]
    assert labels[0] == words
    assert labels[2:] == [["22.0 tokens/s\n2.20x\n0.40 accepted"]]
    speedups = [np.asarray(axis.images[0].get_array()) for axis in grid.axes]
    np.testing.assert_equal(np.ma.filled(speedups[0], np.nan), [[1.4, 1.2], [np.nan, 1.5]])
    np.testing.assert_equal(np.ma.filled(speedups[1], np.nan), [[1.3, np.nan], [0.7, 2.5]])
    # The best speedup is framed: of the second head, without confidence.
    assert [len(axis.patches) for axis in grid.axes] == [0, 1, 0]
    assert grid.axes[1].patches[0].get_xy() == (0.5, 0.5)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_many_rows(tmp_path, drawn):
    """A panel for each machine, a line for each acceptance, and the best length at each point."""
    costs = [RoundCost(rows, 2, d, 1.0, rows * s) for rows in (1, 2) for d, s in ((1, 1), (4, 2))]
    plot_rows({"a $_$": costs, "b": costs[:2]}, tmp_path / "rows.png", title="rows")
    (figure,) = drawn
    first, second = figure.axes
    # Acceptance 0.5: 1.5 tokens in 1 and 2 s beat 1.94 in 2 and 4 s. 0.9: 4.10 beats 1.9.
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[1, 1.5], [2, 0.75]])
    np.testing.assert_allclose(first.lines[2].get_ydata(), [4.0951 / 2, 4.0951 / 4])
    assert read_labels(figure)[0][::2] == ["d = 1", "d = 1", "d = 4"]
    assert len(second.lines[0].get_xydata()) == 1
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
