"""Metrics of each step: as a line of text, in metrics.jsonl, and in TensorBoard if asked for."""

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.checkpoints import METRICS, read_metrics
from lsjax.config import ConfigError

PAUSE = 10.0  # seconds between printed lines
WINDOW = 0.1  # weight of the newest step in the speed that is shown


def step_row(values: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A step's row of metrics, from its arrays and its time; of the exits, those that were on."""
    on = np.flatnonzero(values["enabled_L"])
    exits = {"exits": (on + 1).tolist(), "exit_losses": values["exit_loss_L"][on].tolist()}
    rest = {k: v for k, v in values.items() if k not in ("exit_loss_L", "enabled_L")}
    return {**rest, **exits, "seconds": seconds}


class StepLine:
    """A step's line of text: losses, tokens/s, model FLOPs utilisation, time left."""

    def __init__(
        self, *, num_steps: int, step_tokens: int, step_flops: float, peak_flops: float | None
    ):
        self._num_steps, self._tokens = num_steps, step_tokens
        self._flops, self._peak = step_flops, peak_flops
        self._compiled = False
        self._seconds: float | None = None  # of a step, averaged over the last ones

    def __call__(self, step: int, row: Mapping[str, Any]) -> str:
        """step 120/900  loss 2.31 (exits 3: 3.10, 7: 2.62)  5210 tokens/s  MFU 41%  2:31 left"""
        if self._compiled:
            old = row["seconds"] if self._seconds is None else self._seconds
            self._seconds = old + WINDOW * (row["seconds"] - old)
        self._compiled = True  # by the first step, whose time says nothing
        # Evenly spaced exits where many are on.
        pairs = list(zip(row["exits"], row["exit_losses"], strict=True))[:-1]
        pairs = pairs[:: -(-len(pairs) // 4)] if pairs else []
        exits = ", ".join(f"{exit}: {loss:.2f}" for exit, loss in pairs)
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {float(row['last_exit_loss']):.3f}" + (f" (exits {exits})" if exits else ""),
        ]
        if self._seconds:
            parts.append(f"{self._tokens / self._seconds:,.0f} tokens/s")
            if self._peak:
                parts.append(f"MFU {self._flops / self._seconds / self._peak:.0%}")
            left = round((self._num_steps - step) * self._seconds)
            parts.append(f"{timedelta(seconds=left)} left")
        if int(row["skipped"]):
            parts.append(f"{int(row['skipped'])} steps skipped")
        return "  ".join(parts)


def paced(print: Callable[[str], None], num_steps: int) -> Callable[[int, str], None]:
    """(step, line) -> prints the first line, the last, and between them one every PAUSE seconds."""
    printed = -math.inf

    def show(step: int, line: str) -> None:
        nonlocal printed
        if step == num_steps or time.monotonic() - printed >= PAUSE:
            printed = time.monotonic()
            print(line)

    return show


class MetricsLog:
    """Rows {"kind": ..., "step": n, ...}, appended as they come. A step that a crash lost and that
    is done again is in the file once.

    One of several processes writes; the others have no directory.
    """

    def __init__(self, directory: Path | None, *, from_step: int, tensorboard: bool = False):
        """Keeps the rows of steps up to `from_step`, after which the run resumes."""
        self._file = self._board = None
        if directory is None:
            return
        path = directory / METRICS
        kept = [row for row in read_metrics(directory) if row["step"] <= from_step]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(path)  # at once: a crash here loses nothing
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=from_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row. Numbers that JSON does not have become null; TensorBoard gets the plain ones."""
        if self._file is None:
            return
        row = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._add(f"{kind}/{name}", value, step)

    def _add(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._add(f"{name}/{index + 1}", item, step)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def check_board() -> None:
    """Raises ConfigError where TensorBoard's files can't be written."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ConfigError(
            "TensorBoard needs tensorboardX: pip install 'lsjax[tensorboard]', or leave it off"
        ) from None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
