"""What a run measured, line by line: metrics.jsonl, and TensorBoard where it is asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.checkpoints import METRICS, read_metrics
from lsjax.config import ConfigError


class MetricsLog:
    """Rows {"kind": ..., "step": n, ...}, appended as they come; a step that was lost in a crash
    and is done again is not in the file twice.

    One of several processes writes, the others have no directory.
    """

    def __init__(self, directory: Path | None, *, from_step: int, tensorboard: bool = False):
        """Keeps the rows of steps up to `from_step`, after which the run goes on."""
        self._file = self._board = None
        if directory is None:
            return
        path = directory / METRICS
        kept = [row for row in read_metrics(directory) if row["step"] <= from_step]
        if path.exists():
            whole = "".join(json.dumps(row) + "\n" for row in kept)
            fresh = path.with_suffix(".new")
            fresh.write_text(whole)
            fresh.replace(path)  # at once: a crash here loses nothing
        self._file = path.open("a")
        self._board = _open_board(directory / "tensorboard", from_step) if tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row. Numbers that JSON does not have become null; TensorBoard gets the plain ones."""
        if self._file is None:
            return
        row = {"kind": kind, "step": step, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name not in ("kind", "step"):
                    self._add(f"{kind}/{name}", value, step)

    def _add(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._add(f"{name}/{index + 1}", item, step)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is left."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


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


def _open_board(directory: Path, from_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=from_step + 1)
