"""A complete training run: starts from a new state, or resumes from the newest saved step.

Evaluation, samples and plots are hooks, so training depends on neither decoding nor evaluation.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from lsjax.checkpoints.run import CHECKPOINTS, read_metrics
from lsjax.checkpoints.saving import Checkpoints
from lsjax.model.llama import Llama
from lsjax.training.hosts import is_first, signals
from lsjax.training.metrics import MetricsLog, paced
from lsjax.training.prepare import TrainingRun
from lsjax.training.profiling import traced
from lsjax.training.step import Metrics, TrainState, abstract_state, initial_state, make_train_step

Show = Callable[[int, str], None]  # (steps done, line of metrics), called once for each step


@dataclass(frozen=True)
class Hook:
    """A function called regularly with the model; its result becomes a row of metrics."""

    kind: str  # of the row: "evaluation"
    every: int  # steps; also after the last step
    call: Callable[[int, Llama], Mapping[str, Any]]  # (steps done, stacked model)


class TooManySkipped(RuntimeError):
    """Too many consecutive steps had a non-finite loss or gradient."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after step {step}, which is saved")
        self.number = number  # of the signal
        self.step = step


def train_run(
    run: TrainingRun,
    *,
    hooks: Sequence[Callable[[TrainingRun], Hook]] = (),
    watch: Callable[[TrainingRun, int], AbstractContextManager[Show]] | None = None,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
    began: float | None = None,
    **knobs: Any,
) -> TrainState:
    """Trains from the newest saved step to the last; returns the state after the last step.

    Args:
      hooks: functions that make hooks of the loop: evaluation, samples.
      watch: (run, first step) -> a context whose value shows each step; prints by default.
      say: called with lines about the run, such as the step after which it resumes.
      warn: called with a line for each step that is damaged or could not be saved.
      began: Unix time at which this process began; the start of this call by default.
      knobs: keywords of `make_train_step`.

    Raises CheckpointError if no saved step is intact or the last one can't be written, ConfigError
    if the data changed, and the errors of `run_loop`.
    """
    began = time.time() if began is None else began
    say(run.describe())
    config, mesh = run.config, run.mesh
    train_step = make_train_step(config, **knobs)
    exact = config.dtype == "float32"  # accelerators use fewer bits for matmuls by default
    with (
        jax.default_matmul_precision("highest") if exact else nullcontext(),
        nullcontext() if mesh is None else jax.set_mesh(mesh),
        Checkpoints(run.workdir / CHECKPOINTS, config.checkpoints, warn, run.losses) as checkpoints,
    ):
        like = abstract_state(config, mesh)
        restored = checkpoints.restore(like) if run.resumes else None
        if restored is None:
            state, first = initial_state(config, mesh, like), 0
        else:
            state, first = restored.state, restored.step
            run.resume_data(restored.data)
            say(f"resumes after step {first}")
        due = [make(run) for make in hooks]
        if first == config.num_steps:
            # The program may have been killed during the hooks of the last step.
            done = {row["kind"] for row in read_metrics(run.workdir) if row["step"] == first}
            due = [hook for hook in due if hook.kind not in done]
            if not due:
                say(f"all {first} steps are done: nothing to do")
                return state
        directory = run.workdir if is_first() else None
        log = MetricsLog(directory, config, first, began, may_write=run.writer.holds)
        tracing = traced(train_step, config.profile, run.workdir / "profile", first)
        try:
            shown = watch(run, first) if watch else nullcontext(paced(print, config.num_steps))
            with closing(log), shown as show, tracing as train_step:
                return run_loop(run, state, checkpoints, log, train_step, due, show)
        finally:
            say(f"{log.clock}")


def run_loop(
    run: TrainingRun,
    state: TrainState,
    checkpoints: Checkpoints,
    log: MetricsLog,
    train_step: Callable[..., tuple[TrainState, Metrics]],
    hooks: Sequence[Hook],
    show: Show,
) -> TrainState:
    """Trains from the step of `state` to the last; saves and returns the final state.

    A step is saved before its hooks run. The first hooks after a start may run out of memory, so
    their step is saved and on disk before. If `state` is at the last step, only the hooks run.

    Raises TooManySkipped; Interrupted after SIGTERM or Ctrl-C, with the state saved; and errors of
    hooks, with the state saved by a single process. Raises CheckpointError if the last state can't
    be saved, or if another trainer has taken over the directory.
    """
    config, num_steps, looked = run.config, run.config.num_steps, False
    step = first = int(state.step)
    # The last step and the time at which it is done, while it is not reported.
    waiting: tuple[int, Metrics, Future[float]] | None = None

    def report(number: int, metrics: Metrics, ready: Future[float]) -> None:
        values = jax.device_get(metrics)
        show(number, log.step(number, values, ready.result()))
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row >= config.max_skipped:
            checkpoints.settle()
            raise TooManySkipped(
                f"the loss or gradient of {in_a_row} steps in a row, up to step {number}, was not "
                f"finite (learning rate {float(values['learning_rate']):.3g}): lower "
                "--optimizer.learning-rate or lengthen the warm-up; the parameters are those of "
                f"step {number - in_a_row}, and the newest saved step is {checkpoints.newest()}"
            )

    def save() -> None:
        run.writer.check()
        log.flush()  # a resumed run needs the rows up to its step
        checkpoints.save(state, step=step, data=run.data_position())

    def look(due: Sequence[Hook]) -> None:
        for hook in due:
            log.write(hook.kind, step, hook.call(step, state.model))
            log.spent("evaluation", step)

    if step == num_steps:
        look(hooks)
    with signals() as stop, ThreadPoolExecutor(1) as watcher:
        ready = watcher.submit(time.time)  # time from which the devices have nothing to do
        while step < num_steps:
            batch = run.place(run.pipeline.next())
            log.clock.spend("steps", ready.result() if ready.done() else None)
            log.clock.spend("waiting_for_data")
            state, metrics = train_step(state, batch)
            if step == first:
                log.spent("compiling", step)
            ready = watcher.submit(time_when_ready, metrics)
            step += 1
            if waiting is not None:
                report(*waiting)  # of the previous step, while this one runs
            waiting = step, metrics, ready
            stopped_by = stop(step)
            last = step == num_steps or stopped_by is not None
            due = [hook for hook in hooks if step % hook.every == 0 or step == num_steps]
            first_look = bool(due) and not looked
            saving = last or first_look or step % config.checkpoints.every == 0
            if not (due or saving):
                continue
            report(*waiting)
            waiting = None
            if saving:
                save()
                if last:
                    checkpoints.wait()
                elif first_look:
                    checkpoints.settle()
                log.spent("checkpoints", step)
            if stopped_by is not None and step < num_steps:
                raise Interrupted(stopped_by, step)
            try:
                look(due)
            except Exception:
                if jax.process_count() == 1:
                    save()
                raise
            looked = looked or bool(due)
    return state


def time_when_ready(metrics: Metrics) -> float:
    """Waits until the devices have done a step; returns the Unix time."""
    jax.block_until_ready(metrics)
    return time.time()
