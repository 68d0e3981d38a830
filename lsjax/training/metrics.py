"""Metrics of a step: its FLOPs, its row in metrics.jsonl and trackers, its line of text.

FLOPs are those of the plain model, whatever LayerSkip adds or saves. So utilisations of runs with
and without LayerSkip are comparable (Chowdhery et al., 2022, appendix B). Gradients of frozen
weights do not count.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import jax
import numpy as np
from flax import nnx

from lsjax.config import EarlyExitConfig, LlamaConfig, LoraConfig, Path, TrainConfig
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import split, with_adapters
from lsjax.training.early_exit import exit_counts
from lsjax.training.wall_time import TIME, Clock

PAUSE = 10.0  # seconds between printed lines
WINDOW = 0.1  # weight of the newest step in the printed speed
# Dense bfloat16 FLOPs per second of one jax device, by the start of its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def step_row(values: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A step's row of metrics, from its arrays and its time; lists only the enabled exits."""
    on = np.flatnonzero(values["enabled_L"])
    exits = {"exits": (on + 1).tolist(), "exit_losses": values["exit_loss_L"][on].tolist()}
    rest = {k: v for k, v in values.items() if k not in ("exit_loss_L", "enabled_L")}
    return {**rest, **exits, "seconds": seconds}


@dataclass(kw_only=True)
class StepLine:
    """A step's line of text: losses, tokens/s, model FLOPs utilisation, time left."""

    num_steps: int
    step_tokens: int
    step_flops: float
    peak_flops: float | None  # of all devices together
    _seconds: float | None = None  # of a step, as a moving average

    def __call__(self, step: int, row: Mapping[str, Any]) -> str:
        """step 120/900  loss 2.31 (exits 3: 3.10, 7: 2.62)  5210 tokens/s  MFU 41%  2:31 left"""
        old = row["seconds"] if self._seconds is None else self._seconds
        self._seconds = old + WINDOW * (row["seconds"] - old)
        # Evenly spaced exits, if many are enabled.
        pairs = list(zip(row["exits"], row["exit_losses"], strict=True))[:-1]
        pairs = pairs[:: -(-len(pairs) // 4)] if pairs else []
        exits = ", ".join(f"{exit}: {loss:.2f}" for exit, loss in pairs)
        parts = [
            f"step {step}/{self.num_steps}",
            f"loss {float(row['last_exit_loss']):.3f}" + (f" (exits {exits})" if exits else ""),
            f"{self.step_tokens / self._seconds:,.0f} tokens/s",
        ]
        if self.peak_flops:
            parts.append(f"MFU {self.step_flops / self._seconds / self.peak_flops:.0%}")
        left = round((self.num_steps - step) * self._seconds)
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


class MetricsLog:
    """Appends rows {"kind": ..., "step": n, ...} as they arrive, and has the run's clock. Without a
    directory it writes nothing."""

    def __init__(self, directory: Path | None, config: TrainConfig, from_step: int, began: float):
        """Keeps the rows of steps up to `from_step`, after which the run resumes. So a step that is
        repeated after a crash has only one row.

        began: Unix time at which this process began. Raises ConfigError if wandb can't start.
        """
        # Imported here: counting FLOPs does not need the packages that read checkpoints.
        from lsjax.checkpoints.run import METRICS, read_metrics
        from lsjax.data.files import Lines, write_whole
        from lsjax.training import trackers

        self._file, self._trackers, self._opened = None, [], ExitStack()
        rows = [] if directory is None else read_metrics(directory)
        self.clock = Clock(rows, from_step, began)
        if directory is None:
            return
        kept = [row for row in rows if row["step"] <= from_step]
        kept.append({"kind": TIME, "step": from_step, **self.clock.row()})
        asked = [trackers.weights_and_biases(directory, kept, asdict(config))] * config.wandb
        asked += [trackers.tensorboard(directory, kept)] * config.tensorboard
        self._trackers += map(self._opened.enter_context, asked)
        write_whole(directory / METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._opened.enter_context(closing(Lines(directory / METRICS)))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. NaN and infinity become null."""
        if self._file is None:
            return
        text = json.dumps(dict(values), default=lambda array: array.tolist())
        row = {"kind": kind, "step": step, **json.loads(text, parse_constant=lambda _: None)}
        self._file.write(json.dumps(row) + "\n")
        if kind not in ("step", TIME):  # a resumed run does not repeat it
            self._file.flush()
        for tracker in self._trackers:
            tracker(row)

    def spent(self, use: str, step: int) -> None:
        """Counts the time that is not counted yet for a use, and writes the clock's row."""
        self.clock.spend(use)
        self.clock.lap()
        self.write(TIME, step, self.clock.row())

    def flush(self) -> None:
        """Writes rows that wait, as they do if the directory is in a bucket."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()


def step_flops(
    config: LlamaConfig, batch_size: int, seq_len: int, lora: LoraConfig | None = None
) -> float:
    """FLOPs of one plain training step: one forward pass, one backward pass for the inputs,
    and one for the trained weights.

    Counts two FLOPs per matrix weight and token, with the head and without the lookup. Attention
    counts the causal half of T^2.
    """
    matrices = config.num_layers * config.layer_params + config.head_params
    attention = config.num_layers * config.num_heads * config.head_dim * seq_len
    products = 3.0 * (2.0 * matrices + 2.0 * attention)
    if lora is not None and lora.rank > 0:
        adapters = jax.eval_shape(
            lambda: split(with_adapters(stacked(Llama(config, rngs=nnx.Rngs(0))), lora, 0))[0]
        )
        adapter_params = sum(leaf.size for leaf in jax.tree.leaves(adapters))
        products += 3 * 2.0 * adapter_params - 2.0 * matrices
    return products * batch_size * seq_len


def exit_flops(
    early_exit: EarlyExitConfig, config: LlamaConfig, tokens: int, num_steps: int
) -> float:
    """FLOPs that the intermediate exits add to a step, averaged over the run: three passes through
    the head for each of their tokens."""
    exits = exit_counts(early_exit, config.num_layers, num_steps).mean() * early_exit.token_share
    return 3.0 * 2.0 * config.head_params * tokens * float(exits)


def peak_flops(device_kind: str) -> float | None:
    """FLOPs per second of an accelerator, by jax's name; None for CPUs and unknown devices."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)
