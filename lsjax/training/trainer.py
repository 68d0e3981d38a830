"""The loop: a batch in, a step, and what the step before it measured while this one runs.

What is shown of the model on the way (evaluation, samples, plots) comes as hooks, so that training
knows neither decoding nor evaluation.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lsjax.model.llama import Llama
from lsjax.training.metrics_log import MetricsLog
from lsjax.training.step import Batch, Metrics, TrainState
from lsjax.training.stopping import signals


@dataclass(frozen=True)
class Hook:
    """Something that looks at the model now and then; what it gives becomes a row of metrics."""

    kind: str  # of the row: "evaluation"
    every: int  # steps; also after the last step
    call: Callable[[int, Llama], Mapping[str, Any]]  # (steps done, stacked model)


@dataclass(frozen=True)
class Report:
    """What a step measured, on the host."""

    step: int  # steps done with this one
    values: Mapping[str, Any]
    seconds: float  # of this step, wall clock


class TooManySkipped(RuntimeError):
    """So many steps in a row had a loss or gradient that was no number that the run stopped."""


class Interrupted(SystemExit):
    """A signal ended the run after its state was saved; exit code 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.step = step


@dataclass(frozen=True)
class Loop:
    """All that the loop works with."""

    num_steps: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    next_batch: Callable[[], Batch]
    save: Callable[[int, TrainState], None]
    """Saves a checkpoint (steps done, state); does nothing where this step is saved."""
    wait: Callable[[], None]
    """Returns when the last checkpoint is on disk."""
    save_every: int
    hooks: Sequence[Hook] = ()
    max_skipped: int = 10
    """Steps in a row without a finite loss and gradient that stop the run."""
    show: Callable[[Report], None] = lambda report: None


def run(loop: Loop, state: TrainState, log: MetricsLog) -> TrainState:
    """Trains from the step of `state` to the last; gives the final state, which is saved too.

    A step is saved before its hooks run. The first hooks after a start may run out of memory, so
    they wait until the step is on disk, whether or not a checkpoint is due. The next start then
    resumes behind it. A state of the last step only runs the hooks.

    Raises TooManySkipped; Interrupted (an exit code) after SIGTERM or Ctrl-C, with the state saved;
    and what a hook raises, with the state saved by a single process (several may not be at one).
    """
    step = saved = int(state.step)
    looked = False
    waiting: tuple[int, Metrics] | None = None
    mark = time.perf_counter()  # when the step before was done

    def report() -> None:
        """Fetches what the last step measured; waits for it."""
        nonlocal waiting, mark
        if waiting is None:
            return
        (number, metrics), waiting = waiting, None
        values = jax.device_get(metrics)
        seconds, mark = time.perf_counter() - mark, time.perf_counter()
        done = Report(number, _by_exit(values), seconds)
        log.write("step", number, {**done.values, "seconds": seconds})
        loop.show(done)
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row >= loop.max_skipped:
            raise TooManySkipped(
                f"the loss or gradient of {in_a_row} steps in a row, up to step {number}, was no "
                f"finite number (learning rate {float(values['learning_rate']):.3g}): lower "
                "--optimizer.learning-rate or lengthen the warm-up; the parameters are those of "
                f"step {number - in_a_row}, and the last checkpoint is of step {saved}"
            )

    def look(due: Sequence[Hook]) -> None:
        for hook in due:
            log.write(hook.kind, step, hook.call(step, state.model))

    if step == loop.num_steps:
        look(loop.hooks)
    with signals() as stop:
        while step < loop.num_steps:
            state, metrics = loop.train_step(state, loop.next_batch())
            step += 1
            report()  # of the step before, while this one runs
            waiting = step, metrics
            stopped_by = stop(step)
            last = step == loop.num_steps or stopped_by is not None
            due = [hook for hook in loop.hooks if _is_due(step, hook.every, loop.num_steps)]
            first_look = bool(due) and not looked
            saving = last or first_look or step % loop.save_every == 0
            if not (due or saving):
                continue
            report()
            if saving:
                loop.save(step, state)
                saved = step
            if first_look or last:
                loop.wait()
            if stopped_by is not None and step < loop.num_steps:
                raise Interrupted(stopped_by, step)
            try:
                look(due)
            except Exception:
                if jax.process_count() == 1:
                    loop.save(step, state)
                raise
            looked = looked or bool(due)
            mark = time.perf_counter()  # hooks and saving are no part of a step
    return state


def _is_due(step: int, every: int, num_steps: int) -> bool:
    return step % every == 0 or step == num_steps


def _by_exit(values: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of the exits that were on, by their number; the rest as it is."""
    rest = {
        name: value for name, value in values.items() if name not in ("exit_loss_L", "enabled_L")
    }
    on = np.flatnonzero(values["enabled_L"])
    rest["exits"] = (on + 1).tolist()
    rest["exit_losses"] = values["exit_loss_L"][on].tolist()
    return rest
