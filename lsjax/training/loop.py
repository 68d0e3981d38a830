"""The training loop: a batch in, a step, and the metrics of the step before while this one runs.

Evaluation, samples and plots come as hooks, so that training knows neither decoding nor evaluation.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lsjax.model.llama import Llama
from lsjax.training.hosts import signals
from lsjax.training.metrics import MetricsLog, step_row
from lsjax.training.step import Batch, Metrics, TrainState


@dataclass(frozen=True)
class Hook:
    """Something that looks at the model now and then; what it returns becomes a row of metrics."""

    kind: str  # of the row: "evaluation"
    every: int  # steps; also after the last step
    call: Callable[[int, Llama], Mapping[str, Any]]  # (steps done, stacked model)


class TooManySkipped(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after step {step}, which is saved")
        self.number = number  # of the signal
        self.step = step


def run_loop(
    state: TrainState,
    log: MetricsLog,
    *,
    num_steps: int,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    next_batch: Callable[[], Batch],
    save: Callable[[int, TrainState], None],
    wait: Callable[[], None],
    save_every: int,
    hooks: Sequence[Hook] = (),
    max_skipped: int = 10,
    show: Callable[[int, Mapping[str, Any]], None] = lambda step, row: None,
) -> TrainState:
    """Trains from the step of `state` to the last; gives the final state, which is saved too.

    A step is saved before its hooks run. The first hooks after a start may run out of memory, so
    they wait until the step is on disk, whether or not a checkpoint is due. The next start then
    resumes behind it. A state of the last step only runs the hooks.

    save: begins to save the state after so many steps; does nothing if that step is saved.
    wait: returns when the last saved step is on disk. max_skipped: steps in a row without a finite
    loss and gradient that stop the run. show: called with each step and its row of metrics.

    Raises TooManySkipped; Interrupted after SIGTERM or Ctrl-C, with the state saved; and what a
    hook raises, with the state saved by a single process (several may not be at one).
    """
    step = saved = int(state.step)
    looked = False
    waiting: tuple[int, Metrics] | None = None
    mark = time.perf_counter()  # when the step before was done

    def report() -> None:
        """Fetches the metrics of the last step; waits for it."""
        nonlocal waiting, mark
        if waiting is None:
            return
        (number, metrics), waiting = waiting, None
        values = jax.device_get(metrics)
        seconds, mark = time.perf_counter() - mark, time.perf_counter()
        row = step_row(values, seconds)
        log.write("step", number, row)
        show(number, row)
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row >= max_skipped:
            raise TooManySkipped(
                f"the loss or gradient of {in_a_row} steps in a row, up to step {number}, was no "
                f"finite number (learning rate {float(values['learning_rate']):.3g}): lower "
                "--optimizer.learning-rate or lengthen the warm-up; the parameters are those of "
                f"step {number - in_a_row}, and the last checkpoint is of step {saved}"
            )

    def look(due: Sequence[Hook]) -> None:
        for hook in due:
            log.write(hook.kind, step, hook.call(step, state.model))

    if step == num_steps:
        look(hooks)
    with signals() as stop:
        while step < num_steps:
            state, metrics = train_step(state, next_batch())
            step += 1
            report()  # of the step before, while this one runs
            waiting = step, metrics
            stopped_by = stop(step)
            last = step == num_steps or stopped_by is not None
            due = [hook for hook in hooks if step % hook.every == 0 or step == num_steps]
            first_look = bool(due) and not looked
            saving = last or first_look or step % save_every == 0
            if not (due or saving):
                continue
            report()
            if saving:
                save(step, state)
                saved = step
            if first_look or last:
                wait()
            if stopped_by is not None and step < num_steps:
                raise Interrupted(stopped_by, step)
            try:
                look(due)
            except Exception:
                if jax.process_count() == 1:
                    save(step, state)
                raise
            looked = looked or bool(due)
            mark = time.perf_counter()  # hooks and saving are no part of a step
    return state
