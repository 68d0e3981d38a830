"""Metrics of a run: the line and the row of a step, metrics.jsonl, trackers, wall time by use.

A row of kind "time" in metrics.jsonl holds the seconds of each use so far. Seconds of later rows of
steps are added. So a killed run loses at most the time after its last row.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import jax
import numpy as np

from lsjax.checkpoints.run import METRICS, read_metrics
from lsjax.config import AnyPath, ConfigError, TrainConfig, in_bucket
from lsjax.io.files import local_cache, one_line, remove_directory, write_whole, writing
from lsjax.io.lines import Lines
from lsjax.training.profiling import peak_flops, step_flops

PAUSE = 10.0  # seconds between printed lines
WINDOW = 0.1  # weight of the newest step in the printed speed
TIME = "time"  # kind of the rows of the clock
# "steps_done_again": those of a killed process after its last checkpoint. "checkpoints": the time
# for which they block. "restarts": from the last row of a process until the next one has its state.
USES = (
    *("steps", "steps_done_again", "compiling", "waiting_for_data", "evaluation", "checkpoints"),
    *("start", "restarts"),
)

Row = Mapping[str, Any]  # {"kind": ..., "step": n, ...}
Tracker = Callable[[Row], None]  # called with each row that follows the kept ones of metrics.jsonl


class StepLine:
    """A step's line of text: losses, tokens/s, model FLOPs utilisation, time left."""

    def __init__(self, config: TrainConfig, peak_flops: float | None):
        """peak_flops: FLOPs per second of all devices together, if known."""
        shape = config.batch_size, config.seq_len
        self._num_steps, self._tokens = config.num_steps, math.prod(shape)
        beside = config.lora, config.exit_blocks
        self._flops, self._peak = step_flops(config.model, *shape, *beside), peak_flops
        self._seconds: float | None = None  # of a step, as a moving average

    def __call__(self, step: int, row: Mapping[str, Any]) -> str:
        """step 120/900  loss 2.31 (exits 3: 3.10, 7: 2.62)  5210 tokens/s  MFU 41%  2:31 left"""
        old = row["seconds"] if self._seconds is None else self._seconds
        self._seconds = old + WINDOW * (row["seconds"] - old)
        # Evenly spaced exits, if many are enabled.
        name = "last_exit_loss" if "last_exit_loss" in row else "loss"  # of exit blocks
        pairs = list(zip(row["exits"], row["exit_losses"], strict=True))
        pairs = pairs if name == "loss" else pairs[:-1]
        pairs = pairs[:: -(-len(pairs) // 4)] if pairs else []
        exits = ", ".join(f"{exit}: {loss:.2f}" for exit, loss in pairs)
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {float(row[name]):.3f}" + (f" (exits {exits})" if exits else ""),
            f"{self._tokens / self._seconds:,.0f} tokens/s",
        ]
        if self._peak:
            parts.append(f"MFU {self._flops / self._seconds / self._peak:.0%}")
        left = round((self._num_steps - step) * self._seconds)
        parts.append(f"{timedelta(seconds=left)} left")
        if int(row["skipped"]):
            parts.append(f"{int(row['skipped'])} steps skipped")
        return "  ".join(parts)


def paced(print: Callable[[str], None], num_steps: int) -> Callable[[int, str], None]:
    """(step, line) -> prints the first and the last line, and one every PAUSE seconds between."""
    printed = -math.inf

    def show(step: int, line: str) -> None:
        nonlocal printed
        if step == num_steps or time.monotonic() - printed >= PAUSE:
            printed = time.monotonic()
            print(line)

    return show


class Clock:
    """Counts each moment of the run exactly once. rows: all rows of earlier processes. from_step:
    step after which the run resumes. began: Unix time at which this process began."""

    def __init__(self, rows: Sequence[Row], from_step: int, began: float):
        self._began = next((row["began"] for row in rows if row["kind"] == TIME), began)
        self._seconds = so_far(rows)
        use = "restarts" if self._seconds else "start"
        kept = so_far([row for row in rows if row["step"] <= from_step])["steps"]
        self._seconds["steps_done_again"] += self._seconds["steps"] - kept
        self._seconds["steps"] = kept
        self.spend(use)
        self._last = self._seconds.total()

    def spend(self, use: str, until: float | None = None) -> None:
        """Counts the time that is not counted yet for a use. until: Unix time; now by default."""
        counted = self._began + self._seconds.total()
        self._seconds[use] += max(0.0, (until or time.time()) - counted)

    def lap(self) -> float:
        """Counted seconds since the last call."""
        before, self._last = self._last, self._seconds.total()
        return self._last - before

    def row(self) -> dict[str, float]:
        """The seconds of each use and their sum; began: Unix time of the start of the run."""
        uses = {use: self._seconds[use] for use in USES}
        return {"began": self._began, "wall": self._seconds.total(), **uses}

    def __str__(self):
        wall = self._seconds.total()
        shares = (f"{use.replace('_', ' ')} {self._seconds[use] / wall:.1%}" for use in USES)
        return f"wall time {timedelta(seconds=round(wall))}: {', '.join(shares)}"


def so_far(rows: Sequence[Row]) -> Counter[str]:
    """Seconds of each use up to the last row; empty for rows without times."""
    seconds: Counter[str] = Counter()
    for row in rows:
        if row["kind"] == TIME:
            seconds = Counter({use: row[use] for use in USES})
        elif row["kind"] == "step" and seconds:
            seconds["steps"] += row["seconds"]
    return seconds


class MetricsLog:
    """metrics.jsonl, the trackers and the clock of a run. Without a directory it writes nothing."""

    def __init__(
        self,
        directory: AnyPath | None,
        config: TrainConfig,
        from_step: int,
        began: float,
        may_write: Callable[[], bool] = lambda: True,
    ):
        """Keeps the rows of steps up to `from_step`, after which the run resumes. began: Unix time
        at which this process began. may_write: called before each write; rows are dropped once
        another trainer owns the file. Raises ConfigError if wandb can't start."""
        rows = [] if directory is None else read_metrics(directory)
        self.clock = Clock(rows, from_step, began)
        peak, mesh = peak_flops(jax.devices()[0].device_kind), jax.sharding.get_abstract_mesh()
        self._line = StepLine(config, peak and peak * (1 if mesh.empty else mesh.size))
        self._lines, self._trackers, self._opened = None, [], ExitStack()
        self._may_write = may_write
        if directory is None:
            return
        kept = [row for row in rows if row["step"] <= from_step]
        kept.append({"kind": TIME, "step": from_step, **self.clock.row()})
        if config.wandb:
            self._trackers.append(weights_and_biases(directory, kept, self._opened, config))
        if config.tensorboard:
            self._trackers.append(tensorboard(directory, kept, self._opened))
        write_whole(directory / METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._lines = Lines(directory / METRICS)
        self._opened.callback(self._close_lines)

    def step(self, step: int, values: Mapping[str, Any], ended: float) -> str:
        """Writes the row of a step; returns its line of text. ended: Unix time of its end."""
        self.clock.spend("steps", ended)
        on = np.flatnonzero(values["enabled_L"])
        row = {k: v for k, v in values.items() if k not in ("exit_loss_L", "enabled_L")}
        row |= {"exits": (on + 1).tolist(), "exit_losses": values["exit_loss_L"][on].tolist()}
        row["seconds"] = self.clock.lap()
        self.write("step", step, row)
        return self._line(step, row)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. NaN and infinity become null."""
        if self._lines is None or not self._may_write():
            return
        text = json.dumps(dict(values), default=lambda array: array.tolist())
        row = {"kind": kind, "step": step, **json.loads(text, parse_constant=lambda _: None)}
        self._lines.write(json.dumps(row) + "\n")
        if kind not in ("step", TIME):  # a resumed run does not repeat it
            self._lines.flush()
        for tracker in self._trackers:
            tracker(row)

    def spent(self, use: str, step: int) -> None:
        """Counts the time that is not counted yet for a use, and writes the clock's row."""
        self.clock.spend(use)
        self.clock.lap()
        self.write(TIME, step, self.clock.row())

    def flush(self) -> None:
        """Writes rows that wait, as they do if the directory is in a bucket."""
        if self._lines is not None and self._may_write():
            self._lines.flush()

    def _close_lines(self) -> None:
        if self._may_write():
            self._lines.close()

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()


def tensorboard(directory: AnyPath, kept: Sequence[Row], opened: ExitStack) -> Tracker:
    """Event files in tensorboard/. They hide rows of earlier starts after the kept ones."""
    from tensorboardX import SummaryWriter

    folder = directory / "tensorboard"
    board = SummaryWriter(str(folder), purge_step=kept[-1]["step"] + 1)

    def write(row: Row) -> None:
        for name, number in numbers(row).items():
            board.add_scalar(name, number, row["step"])

    def close() -> None:
        with writing(folder):
            board.close()

    opened.callback(close)
    return write


def weights_and_biases(
    directory: AnyPath, kept: Sequence[Row], opened: ExitStack, config: TrainConfig
) -> Tracker:
    """One run at Weights & Biases, however often it starts: its id is the time when it began.

    wandb loses the last steps of a killed process. So each start sends the kept rows that the
    server lacks. Offline it writes all of them, and removes the files of earlier starts.
    Raises ConfigError if wandb can't start.
    """
    import wandb

    run_id = f"{round(1e6 * kept[-1]['began']):x}"
    folder = local_cache() if in_bucket(directory) else directory.absolute()
    for old in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
        remove_directory(old)
    settings = wandb.Settings(console="off")  # it would capture the progress bar
    about = dict(name=directory.name, config=asdict(config), dir=str(folder), settings=settings)
    try:
        run = opened.enter_context(wandb.init(id=run_id, resume="allow", **about))
    except wandb.Error as error:
        fix = "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
        raise ConfigError(f"wandb can't start ({one_line(error)}): {fix}") from error
    first = run.step  # that the server lacks

    def write(row: Row) -> None:
        if row["step"] >= first:
            run.log(numbers(row), step=row["step"])

    for row in kept:
        write(row)
    return write


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row by kind/field; those of a list by kind/field/1 and so on."""
    flat: dict[str, Any] = {}
    for name in row.keys() - {"kind", "step"}:
        key, value = f"{row['kind']}/{name}", row[name]
        items = enumerate(value, start=1) if isinstance(value, list) else ()
        flat |= {f"{key}/{index}": item for index, item in items} or {key: value}
    return {key: value for key, value in flat.items() if type(value) in (int, float)}
