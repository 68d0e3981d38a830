"""The line of a step, and which lines are printed."""

import io
from functools import partial

from lsjax.checkpoints.run import METRICS
from lsjax.config import LlamaConfig, TrainConfig
from lsjax.io import lines
from lsjax.training.metrics import MetricsLog, StepLine, paced
from lsjax.training.profiling import step_flops

CONFIG = TrainConfig(num_steps=100, batch_size=10, seq_len=100, model=LlamaConfig.tiny())


def metrics(step, exits, losses, seconds, skipped=0):
    row = dict(exits=exits, exit_losses=losses, last_exit_loss=losses[-1], skipped=skipped)
    return step, {**row, "seconds": seconds}


def test_figures_of_a_step():
    out = io.StringIO()
    show = paced(partial(print, file=out), num_steps=100)
    line = StepLine(CONFIG, peak_flops=step_flops(CONFIG.model, 10, 100) / 0.3)
    show(1, line(*metrics(1, [16], [5.0], 2.0)))
    show(2, line(*metrics(2, [3, 16], [4.5, 4.0], 2.0)))
    show(100, line(*metrics(100, [*range(2, 17)], [*range(2, 17)], 2.0, skipped=3)))
    first, last = out.getvalue().splitlines()  # the second came too soon for a line of its own
    assert first.split("  ") == [
        *("step 1/100", "loss 5.000", "500 tokens/s", "MFU 15%", "0:03:18 left"),
    ]
    assert last.split("  ") == [
        "step 100/100",
        "loss 16.000 (exits 2: 2.00, 6: 6.00, 10: 10.00, 14: 14.00)",
        "500 tokens/s",
        "MFU 15%",  # in 2 s
        "0:00:00 left",
        "3 steps skipped",
    ]
    assert "exits 3: 4.50)" in line(*metrics(2, [3, 16], [4.5, 4.0], 2.0))
    assert "0:03:16 left" in line(*metrics(2, [16], [4.0], 2.0))  # 98 steps of 2 s


def test_no_row_is_written_once_another_trainer_writes(tmp_path, monkeypatch):
    """Neither new rows nor those that wait, as they do in a bucket."""
    monkeypatch.setattr(lines, "in_bucket", lambda path: path.name == METRICS)
    ours = [True]
    log = MetricsLog(tmp_path, CONFIG, 0, 0.0, may_write=lambda: ours[0])
    log.write("sample", 1, {"text": "ours"})
    log.write("step", 2, {"seconds": 1.0})
    ours[0] = False
    (tmp_path / METRICS).write_text("of another trainer")
    log.write("sample", 3, {"text": "late"})
    log.flush()
    log.close()
    assert (tmp_path / METRICS).read_text() == "of another trainer"
