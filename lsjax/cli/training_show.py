"""What people see of a training: a line that moves in a terminal, a line now and then elsewhere."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lsjax.training.trainer import Report

PAUSE = 10.0  # seconds between lines where there is no terminal
WINDOW = 0.1  # weight of the newest step in the speed that is shown


class TrainingProgress(AbstractContextManager):
    """Loss of the last and the enabled exits, tokens/s, model FLOPs utilisation, time left."""

    def __init__(
        self,
        console: Console,
        *,
        num_steps: int,
        first_step: int,
        step_tokens: int,
        step_flops: float,
        peak_flops: float | None,
    ):
        self._console, self._num_steps = console, num_steps
        self._step_tokens, self._step_flops, self._peak = step_tokens, step_flops, peak_flops
        self._seconds: float | None = None  # of a step, averaged over the last ones
        self._steps = 0
        self._shown = -PAUSE
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def show(self, report: Report) -> None:
        """One more step is done."""
        self._steps += 1
        if self._steps > 1:  # the first one compiled
            old = report.seconds if self._seconds is None else self._seconds
            self._seconds = old + WINDOW * (report.seconds - old)
        line = self.line(report)
        self._bar.update(self._task, completed=report.step, description=line)
        now = time.monotonic()
        last = report.step == self._num_steps
        if not self._console.is_terminal and (now - self._shown >= PAUSE or last):
            self._shown = now
            self._console.print(line)

    def line(self, report: Report) -> str:
        """step 120/900  loss 2.31 (exits 3: 3.10, 7: 2.62)  5210 tokens/s  MFU 41%  2:31 left"""
        values = report.values
        # The most telling few where all exits are on.
        pairs = list(zip(values["exits"], values["exit_losses"], strict=True))[:-1]
        pairs = pairs[:: -(-len(pairs) // 4)] if pairs else []
        exits = ", ".join(f"{exit}: {loss:.2f}" for exit, loss in pairs)
        parts = [
            f"step {report.step}/{self._num_steps}",
            f"loss {float(values['last_exit_loss']):.3f}" + (f" (exits {exits})" if exits else ""),
        ]
        if self._seconds:
            parts.append(f"{self._step_tokens / self._seconds:,.0f} tokens/s")
            if self._peak:
                parts.append(f"MFU {self._step_flops / self._seconds / self._peak:.0%}")
            left = round((self._num_steps - report.step) * self._seconds)
            parts.append(f"{timedelta(seconds=left)} left")
        if int(values["skipped"]):
            parts.append(f"{int(values['skipped'])} steps skipped")
        return "  ".join(parts)

    def print(self, *things, **options) -> None:
        """Above the moving line."""
        self._console.print(*things, **options)
