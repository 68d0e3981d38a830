"""The line that training shows."""

import io

from rich.console import Console

from lsjax.cli.training_show import TrainingProgress
from lsjax.training.trainer import Report


def report(step, exits, losses, seconds, skipped=0):
    values = dict(exits=exits, exit_losses=losses, last_exit_loss=losses[-1], skipped=skipped)
    return Report(step, values, seconds)


def test_figures_of_a_step():
    out = io.StringIO()
    progress = TrainingProgress(
        Console(file=out, width=200),
        num_steps=100,
        first_step=0,
        step_tokens=1000,
        step_flops=3e9,
        peak_flops=1e10,
    )
    with progress:
        progress.show(report(1, [16], [5.0], 30.0))  # compiles: no speed yet
        progress.show(report(2, [3, 16], [4.5, 4.0], 2.0))
        progress.show(report(100, [*range(2, 17)], [*range(2, 17)], 2.0, skipped=3))
    first, last = out.getvalue().splitlines()  # the second came too soon for a line of its own
    assert first.split("  ") == ["step 1/100", "loss 5.000"]
    assert last.split("  ") == [
        "step 100/100",
        "loss 16.000 (exits 2: 2.00, 6: 6.00, 10: 10.00, 14: 14.00)",
        "500 tokens/s",
        "MFU 15%",  # 1.5e9 of 1e10
        "0:00:00 left",
        "3 steps skipped",
    ]
    assert "exits 3: 4.50)" in progress.line(report(2, [3, 16], [4.5, 4.0], 2.0))
    assert "0:03:16 left" in progress.line(report(2, [16], [4.0], 2.0))  # 98 steps of 2 s
