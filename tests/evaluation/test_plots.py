"""What the curves of a training and of exits show."""

import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.evaluation.intervals import Estimate
from lsjax.evaluation.plots import estimates, plot_exits, plot_training


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
    # Exit 3 was never trained. A null is a gap.
    assert list(found) == ["exit 1", "exit 2", "exit 4", "held out"]
    assert found["exit 1"] == [(1, 4.9), (3, 4.7)]
    np.testing.assert_equal(found["exit 4"], [(1, 3.9), (2, np.nan), (3, 3.7)])
    assert lines(agreements) == {"exit 1": [(3, 0.1)], "exit 2": [(3, 0.2)], "exit 4": [(3, 1)]}
    assert agreements.get_xlim()[0] == 0  # a single evaluation stands at its step
    # Without the first step, which compiles.
    np.testing.assert_equal(speeds.lines[-1].get_ydata(), [np.nan, 200, 200])


def test_steps_that_share_their_time_are_no_peak(drawn, tmp_path):
    rows = [step(number, [1, 4]) for number in range(1, 21)]
    rows[7]["seconds"], rows[8]["seconds"] = 0.996, 0.004
    plot_training(rows, tmp_path / "plot.png")
    each, smooth = (line.get_ydata()[1:] for line in drawn[0].axes[3].lines)
    assert each.max() < 300 and smooth.max() < 225
    np.testing.assert_allclose(each[[0, 4, 10, -1]], 200)


def test_every_trained_exit_is_shown(drawn, tmp_path):
    """Also those of a curriculum of many exits, of which seven have names."""
    rows = [step(number, [*range(1, 21)]) for number in range(1, 4)]
    plot_training(rows, tmp_path / "plot.png")
    losses = drawn[0].axes[0]
    assert len(losses.lines) == 1 + 20 + 20  # with held-out dots
    names = [name for name in lines(losses) if name.startswith("exit")]
    assert names == [f"exit {number}" for number in (1, 4, 7, 11, 14, 17, 20)]


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
    losses = {"with $x$": estimates((3.0, 2.0)), "without": estimates((4.0, 3.0, 2.0))}
    agreements = {"with $x$": estimates((0.5, 1.0)), "without": estimates((0.1, 0.5, 1.0))}
    plot_exits(losses, agreements, tmp_path / "plot.png", trained=(1,))
    loss_axes, agreement_axes = drawn[0].axes
    found = lines(loss_axes)
    assert found.pop("exit with a loss in training") == []
    assert found == {
        r"with \$x\$": [(1, 3.0), (2, 2.0)],
        "without": [(1, 4.0), (2, 3.0), (3, 2.0)],
    }
    assert lines(agreement_axes)["without"] == [(1, 0.1), (2, 0.5), (3, 1.0)]
    for axes in drawn[0].axes:  # the trained exit is marked in both
        assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]


def test_small_differences_look_small(drawn, tmp_path):
    """Losses that differ by 0.015 do not fill the axis. Intervals are shaded."""
    losses = {"a": [Estimate(2.0, 1.99, 2.01), Estimate(2.015, 2.0, 2.02)]}
    plot_exits(losses, {"a": estimates((0.5, 1.0))}, tmp_path / "plot.svg")
    loss_axes, agreement_axes = drawn[0].axes
    low, high = loss_axes.get_ylim()
    assert high - low == pytest.approx(0.2) and low < 1.99 < 2.02 < high
    assert len(loss_axes.collections) == 1 and not agreement_axes.collections


def test_a_svg_takes_the_colours_of_its_page_and_repeats(tmp_path):
    """Text stays text, without a background and without a date."""
    for name in ("one.svg", "two.svg"):
        plot_exits(
            {"a <b>": estimates((2.0, 1.0))}, {"a <b>": estimates((0.5, 1.0))}, tmp_path / name
        )
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two and one.startswith('<svg fill="currentColor"')
    assert "#000000" not in one and "#ffffff" not in one and "stroke: currentColor" in one
    assert ">a &lt;b&gt;</text>" in one
