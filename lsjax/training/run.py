"""A whole training run: it trains from a new state, or resumes from the newest saved step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax

from lsjax.checkpoints import CHECKPOINTS, Checkpoints, read_metrics
from lsjax.config import TrainConfig, check
from lsjax.training.flops import peak_flops, step_flops
from lsjax.training.hosts import is_first
from lsjax.training.loop import Hook, Interrupted, TooManySkipped, run_loop
from lsjax.training.metrics import MetricsLog, StepLine, paced
from lsjax.training.prepare import TrainingRun
from lsjax.training.step import TrainState, abstract_state, initial_state, make_train_step

Show = Callable[[int, str], None]  # (steps done, line of figures), called once for each step


@contextmanager
def printed(run: TrainingRun, first: int) -> Iterator[Show]:
    """Prints the line of a step now and then."""
    yield paced(print, run.config.num_steps)


def train_run(
    run: TrainingRun,
    *,
    hooks: Sequence[Callable[[TrainingRun], Hook]] = (),
    watch: Callable[[TrainingRun, int], AbstractContextManager[Show]] = printed,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
    **knobs: Any,
) -> TrainState:
    """Trains from the newest saved step to the last; gives the state after the last step.

    Args:
      hooks: functions that make hooks of the loop: evaluation, samples.
      watch: (run, first step) -> a context around the steps, whose value shows each step.
      say: called with lines about the run, such as the step after which it resumes.
      warn: called with a line for each step that is damaged or could not be saved.
      knobs: keywords of `make_train_step`.

    Raises CheckpointError if no saved step is whole or the last one can't be written, ConfigError
    if the data changed, and what `run_loop` raises.
    """
    say(run.describe())
    config, mesh = run.config, run.mesh
    train_step = make_train_step(config, **knobs)
    line = step_line(config, 1 if mesh is None else mesh.size)  # measures outside of the mesh
    exact = config.dtype == "float32"  # accelerators use fewer bits for products unless told
    with (
        jax.default_matmul_precision("highest") if exact else nullcontext(),
        nullcontext() if mesh is None else jax.set_mesh(mesh),
        Checkpoints(run.workdir / CHECKPOINTS, config.checkpoints, warn, run.losses) as checkpoints,
    ):
        state, first = first_state(run, checkpoints, say)
        due = [make(run) for make in hooks]
        if first == config.num_steps:
            # The program may have been killed while it looked at the last step.
            done = {row["kind"] for row in read_metrics(run.workdir) if row["step"] == first}
            due = [hook for hook in due if hook.kind not in done]
            if not due:
                say(f"all {first} steps are done: nothing to do")
                return state

        def save(step: int, state: TrainState) -> None:
            position = {**run.pipeline.state(), "held_out": run.held_out.rows.fingerprint}
            checkpoints.save(state, step=step, config=config, data=position)

        directory = run.workdir if is_first() else None
        log = MetricsLog(directory, from_step=first, tensorboard=config.tensorboard)
        try:
            with watch(run, first) as show:
                return run_loop(
                    state,
                    log,
                    num_steps=config.num_steps,
                    train_step=train_step,
                    next_batch=lambda: run.place(run.pipeline.next()),
                    save=save,
                    wait=checkpoints.settle,
                    save_every=config.checkpoints.every,
                    hooks=due,
                    max_skipped=config.max_skipped,
                    show=lambda step, row: show(step, line(step, row)),
                )
        except Interrupted:
            checkpoints.wait()  # every host stops here
            raise
        except TooManySkipped:
            checkpoints.settle()
            raise
        finally:
            log.close()


def first_state(
    run: TrainingRun, checkpoints: Checkpoints, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The state of the newest saved step, with the data after it, or a new state; and its step."""
    like = abstract_state(run.config, run.mesh)
    restored = checkpoints.restore(like) if run.resumes else None
    if restored is None:
        return initial_state(run.config, run.mesh, like), 0
    run.pipeline.restore(restored.data)
    now = run.held_out.rows.fingerprint
    before = restored.data.get("held_out", now)  # checkpoints of older versions have no such entry
    check(
        before == now,
        "the validation data differ from those that the run began with (fingerprint "
        f"{before}, now {now}): give the same data, or begin a new run",
    )
    say(f"going on after step {restored.step}")
    return restored.state, restored.step


def step_line(config: TrainConfig, devices: int) -> StepLine:
    """A step's metrics as a line of text."""
    dtype = "float32" if config.dtype == "auto" else config.dtype  # of a product that is timed
    return StepLine(
        num_steps=config.num_steps,
        step_tokens=config.batch_size * config.seq_len,
        step_flops=step_flops(config.model, config.batch_size, config.seq_len, config.lora),
        peak_flops=peak_flops(dtype, devices),
    )
