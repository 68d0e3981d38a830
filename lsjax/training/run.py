"""A complete training run: starts from a new state, or resumes from the newest saved step.

Evaluation, samples and plots are hooks, so training depends on neither decoding nor evaluation.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jaxtyping import Int32

from lsjax.checkpoints.exit_blocks import check_base, read_base
from lsjax.checkpoints.run import CHECKPOINTS, CONFIG, RECIPE, read_metrics
from lsjax.checkpoints.saving import Checkpoints
from lsjax.config.checked import versioned
from lsjax.data.token_counts import COUNTS, most_frequent, read_counts
from lsjax.io.files import cache_directory, write_json
from lsjax.model.llama import Llama
from lsjax.training.hosts import is_first, signals
from lsjax.training.kept_states import keep_states
from lsjax.training.metrics import MetricsLog, paced
from lsjax.training.prepare import TrainingRun
from lsjax.training.profiling import traced
from lsjax.training.step import (
    Batch,
    Metrics,
    TrainState,
    abstract_state,
    initial_state,
    make_train_step,
)

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
    make_hooks: Sequence[Callable[[TrainingRun], Hook]] = (),
    watch: Callable[[TrainingRun, int], AbstractContextManager[Show]] | None = None,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
    began: float | None = None,
) -> TrainState:
    """Trains from the newest saved step to the last; returns the state after the last step.

    Args:
      make_hooks: functions that make hooks of the loop: evaluation, samples.
      watch: (run, first step) -> a context whose value shows each step; prints by default.
      say: called with lines about the run, such as the step after which it resumes.
      warn: called with a line for each step that is damaged or could not be saved.
      began: Unix time at which this process began; the start of this call by default.

    Raises CheckpointError if no saved step is intact or the last one can't be written. Raises
    ConfigError if the data changed. Also raises the errors of `TrainingLoop.run`.
    """
    began = time.time() if began is None else began
    say(run.describe())
    config, mesh, drafted = run.config, run.mesh, draft_ids(run)
    train_step = make_train_step(config, **vars(run.recipe), draft_ids=drafted)
    exact = config.dtype == "float32"  # accelerators use fewer bits for matmuls by default
    with (
        jax.default_matmul_precision("highest") if exact else nullcontext(),
        nullcontext() if mesh is None else jax.set_mesh(mesh),
        Checkpoints(run.workdir / CHECKPOINTS, config.checkpoints, warn, run.losses) as checkpoints,
    ):
        like = abstract_state(config, mesh, run.recipe.optimizer)
        state = newest_state(run, checkpoints, like)
        if (first := int(state.step)) > 0:
            say(f"resumes after step {first}")
        hooks = [make_hook(run) for make_hook in make_hooks]
        left = unfinished(run, hooks, first)
        if first == config.num_steps and not left:
            say(f"all {first} steps are done: nothing to do")
            return state
        if config.exit_blocks.keep_states:
            base = read_base(run.workdir, "float32")["float32"]
            where = dict(place=run.place, cache=cache_directory())
            keep_states(config, run.pipeline, state.model, base, drafted, **where, say=say)
        directory = run.workdir if is_first() else None
        if directory is not None:
            write_json(directory / RECIPE, run.recipe.given())
        log = MetricsLog(directory, config, first, began, may_write=run.writer.holds)
        tracing = traced(train_step, config.profile, run.workdir / "profile", first)
        try:
            shown = watch(run, first) if watch else nullcontext(paced(print, config.num_steps))
            with closing(log), shown as show, tracing as train_step:
                loop = TrainingLoop(run, state, checkpoints, log, hooks, show)
                del state  # the loop's first step donates it
                return loop.run(train_step, left)
        finally:
            say(f"{log.clock}")


def newest_state(run: TrainingRun, checkpoints: Checkpoints, like: TrainState) -> TrainState:
    """The newest undamaged saved state, with its position in the data, or that before the first
    step. The model that exit blocks hang off is not saved: it is read again. like: its shapes."""

    begin = partial(initial_state, run.config, run.mesh, like, run.recipe.optimizer)
    base = None
    if run.config.exit_blocks.exits:
        given = run.workdir, run.config.init_from
        base = begin(lambda model: check_base(*given, model, may_write=is_first()))
        if is_first():  # the place where the base was found
            write_json(run.workdir / CONFIG, versioned(run.config))
    restored = checkpoints.restore(like, base) if run.resumes else None
    if restored is None:
        return begin() if base is None else base
    run.resume_data(restored.data)
    return restored.state


def hooks_due(hooks: Sequence[Hook], step: int, num_steps: int) -> list[Hook]:
    """Hooks that run after a step of a training of `num_steps`."""
    return [hook for hook in hooks if step % hook.every == 0 or step == num_steps]


def unfinished(run: TrainingRun, hooks: Sequence[Hook], step: int) -> list[Hook]:
    """Hooks of a saved step that are not done: the program may have ended before they were."""
    due = hooks_due(hooks, step, run.config.num_steps)
    if step == 0 or not due:
        return []
    done = {row["kind"] for row in read_metrics(run.workdir) if row["step"] == step}
    # A disk may show an older file to some hosts. All must run the same hooks, or they would hang.
    is_left = broadcast_one_to_all(np.array([hook.kind not in done for hook in due]))
    return [hook for hook, left in zip(due, is_left, strict=True) if left]


def draft_ids(run: TrainingRun) -> Int32[np.ndarray, " W"] | None:
    """Tokens that exit blocks learn to draft; None for all. They stay the same in a resumed run."""
    size = run.config.exit_blocks.draft_vocab
    if size is None:
        return None
    return most_frequent(read_counts(run.workdir / COUNTS, run.tokenizer), size)


class TrainingLoop:
    """Trains from the step of `state` to the last.

    A step is saved before its hooks run. The first hooks after a start may run out of memory, so
    their step is saved and on disk before.
    """

    def __init__(
        self,
        run: TrainingRun,
        state: TrainState,
        checkpoints: Checkpoints,
        log: MetricsLog,
        hooks: Sequence[Hook],
        show: Show,
    ):
        self.state, self.step = state, int(state.step)
        self._run, self._config, self._checkpoints = run, run.config, checkpoints
        self._log, self._hooks, self._show = log, hooks, show
        self._has_evaluated = False
        # The last step and the time at which it is done, while it is not reported.
        self._waiting: tuple[int, Metrics, Future[float]] | None = None

    def run(
        self, train_step: Callable[..., tuple[TrainState, Metrics]], left: Sequence[Hook] = ()
    ) -> TrainState:
        """Trains, and returns the final state, which is saved. left: hooks of the first state's
        step that are not done. They run first.

        Raises TooManySkipped; Interrupted after SIGTERM or Ctrl-C, with the state saved; and errors
        of hooks, with the state saved by a single process. Raises CheckpointError if the last state
        can't be saved, or if another trainer has taken over the directory.
        """
        num_steps, first = self._config.num_steps, self.step
        self._evaluate(left)
        with signals() as stop, ThreadPoolExecutor(1) as watcher:
            ready = watcher.submit(time.time)  # time from which the devices have nothing to do
            while self.step < num_steps:
                batch = self._next_batch(ready)
                self.state, metrics = train_step(self.state, batch)
                if self.step == first:
                    self._log.spent("compiling", self.step)
                ready = watcher.submit(time_when_ready, metrics)
                self.step += 1
                self._report()  # the previous step, while this one runs
                self._waiting = self.step, metrics, ready
                self._after_step(stop(self.step))
        return self.state

    def _next_batch(self, ready: Future[float]) -> Batch:
        """The next batch on the devices. ready: gives the time at which the last step is done."""
        batch = self._run.place(self._run.pipeline.next())
        self._log.clock.spend("steps", ready.result() if ready.done() else None)
        self._log.clock.spend("waiting_for_data")
        return batch

    def _after_step(self, stopped_by: int | None) -> None:
        """Saves and evaluates, if it is time. stopped_by: number of a signal."""
        step, num_steps = self.step, self._config.num_steps
        last = step == num_steps or stopped_by is not None
        due = hooks_due(self._hooks, step, num_steps)
        comes_first = bool(due) and not self._has_evaluated
        saving = last or comes_first or step % self._config.checkpoints.every == 0
        if not (due or saving):
            return
        self._report()
        if saving:
            self._save()
            if last:
                self._checkpoints.wait()
            elif comes_first:
                self._checkpoints.settle()
            self._log.spent("checkpoints", step)
        if stopped_by is not None and step < num_steps:
            raise Interrupted(stopped_by, step)
        try:
            self._evaluate(due)
        except Exception:
            if jax.process_count() == 1:
                self._save()
            raise

    def _report(self) -> None:
        """Shows and logs the last step, if it is not reported yet."""
        if self._waiting is None:
            return
        (step, metrics, ready), self._waiting = self._waiting, None
        values = jax.device_get(metrics)
        self._show(step, self._log.step(step, values, ready.result()))
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row >= self._config.max_skipped:
            self._checkpoints.settle()
            rate = values.get("learning_rate")
            rate = "" if rate is None else f" (learning rate {float(rate):.3g})"
            raise TooManySkipped(
                f"the loss or gradient of {in_a_row} steps in a row, up to step {step}, was not "
                f"finite{rate}: lower the learning rate or lengthen the warm-up; the "
                f"parameters are those of step {step - in_a_row}, and the newest saved step is "
                f"{self._checkpoints.newest()}"
            )

    def _save(self) -> None:
        self._run.writer.check()
        self._log.flush()  # a resumed run needs the rows up to its step
        self._checkpoints.save(self.state, step=self.step, data=self._run.data_position())

    def _evaluate(self, due: Sequence[Hook]) -> None:
        for hook in due:
            self._log.write(hook.kind, self.step, hook.call(self.step, self.state.model))
            self._log.spent("evaluation", self.step)
            self._has_evaluated = True


def time_when_ready(metrics: Metrics) -> float:
    """Waits until the devices have done a step; returns the Unix time."""
    jax.block_until_ready(metrics)
    return time.time()
