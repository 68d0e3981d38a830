"""The line of a step, which lines are printed, and what TensorBoard gets."""

import io
import struct
from functools import partial

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from lsjax.training.metrics import MetricsLog, StepLine, paced


def metrics(step, exits, losses, seconds, skipped=0):
    row = dict(exits=exits, exit_losses=losses, last_exit_loss=losses[-1], skipped=skipped)
    return step, {**row, "seconds": seconds}


def test_figures_of_a_step():
    out = io.StringIO()
    show = paced(partial(print, file=out), num_steps=100)
    line = StepLine(num_steps=100, step_tokens=1000, step_flops=3e9, peak_flops=1e10)
    show(1, line(*metrics(1, [16], [5.0], 30.0)))  # compiles: no speed yet
    show(2, line(*metrics(2, [3, 16], [4.5, 4.0], 2.0)))
    show(100, line(*metrics(100, [*range(2, 17)], [*range(2, 17)], 2.0, skipped=3)))
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
    assert "exits 3: 4.50)" in line(*metrics(2, [3, 16], [4.5, 4.0], 2.0))
    assert "0:03:16 left" in line(*metrics(2, [16], [4.0], 2.0))  # 98 steps of 2 s


def test_tensorboard_gets_the_numbers(tmp_path):
    """Scalars of the step and of each exit, read back from its file."""
    log = MetricsLog(tmp_path, from_step=0, tensorboard=True)
    log.write("step", 3, {"loss": np.float32(1.5), "exits": [2, 4], "on": True, "text": "x"})
    log.write("evaluation", 3, {"loss_E": [0.25, np.nan]})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert found == {
        ("step/loss", 3): 1.5,
        ("step/exits/1", 3): 2,
        ("step/exits/2", 3): 4,
        ("evaluation/loss_E/1", 3): 0.25,
    }
