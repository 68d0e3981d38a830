"""A whole training run: its input is checked and its data read, then it trains or resumes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lsjax.checkpoints import (
    CHECKPOINTS,
    Checkpoints,
    begin_run,
    held_out_losses,
    is_run,
    open_checkpoint,
    read_metrics,
    read_run_config,
    saved_steps,
)
from lsjax.config import LlamaConfig, MeshConfig, TrainConfig, check
from lsjax.data.pipeline import SPLITS, OnePass, Pipeline, packed_rows
from lsjax.data.token_store import cache_directory
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.vocabulary import make_tokenizer
from lsjax.sharding import make_mesh, own_rows, placed_rows
from lsjax.training.flops import peak_flops, step_flops
from lsjax.training.hosts import check_same, in_turn, is_first, wait_to_see
from lsjax.training.loop import Hook, Interrupted, TooManySkipped, run_loop
from lsjax.training.metrics import MetricsLog, StepLine, StepMetrics, check_board, paced
from lsjax.training.run_files import held_out_prompts, sample_prompt, write_run_files
from lsjax.training.start import abstract_state, check_rows, check_same_run, initial_state
from lsjax.training.step import TrainState, make_train_step

Show = Callable[[int, str], None]  # (steps done, line of figures), called once for each step


@dataclass(frozen=True)
class TrainingRun:
    """A run whose input is checked, whose data is read, and whose directory is there."""

    config: TrainConfig  # with the model's shape
    workdir: Path
    resumes: bool  # whether the directory held this run already
    mesh: Mesh | None
    tokenizer: Tokenizer
    pipeline: Pipeline  # the training rows of this host
    held_out: OnePass
    sample_prompt: list[int]  # tokens that samples continue
    losses: dict[int, float]  # held-out loss of the last exit by step; evaluations add theirs

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A batch of this host's rows on the devices that compute with them."""
        return placed_rows(batch, self.config.batch_size, self.mesh)

    def describe(self) -> str:
        """Two lines: the model and the data."""
        config, rows = self.config, self.pipeline.rows
        tokens = config.num_steps * config.batch_size * config.seq_len
        return (
            f"{self.workdir}: {config.model.num_params / 1e6:.1f}M parameters, "
            f"{config.model.num_layers} layers; {config.num_steps} steps of {config.batch_size} x "
            f"{config.seq_len} tokens, {tokens / len(rows) / rows.seq_len:.2g} passes over\n"
            f"{rows.describe()}"
        )


def prepare_run(config: TrainConfig, workdir: Path) -> TrainingRun:
    """Checks everything that can be checked before anything is compiled, and reads the data.

    Raises ConfigError, CheckpointError, TokenizerError or OSError for bad input.
    """
    resumes = is_run(workdir)
    if resumes:
        config = check_same_run(read_run_config(workdir), config, str(workdir))
    if config.init_from and not saved_steps(workdir / CHECKPOINTS):
        config = with_model(config, open_checkpoint(config.init_from).config)
    alone = jax.process_count() == 1 and config.mesh == MeshConfig()
    mesh = None if alone else make_mesh(config.mesh)
    check_rows(config, mesh)
    if config.tensorboard and is_first():
        check_board()
    check_same("the configurations and the states of --workdir", f"{config} {resumes}")

    settings = config.evaluation
    with in_turn("the data are read"):
        tokenizer, pipeline, held_out = read_data(config, mesh)
    fingerprints = tokenizer.fingerprint, pipeline.rows.fingerprint, held_out.rows.fingerprint
    check_same("the tokenizers and the data", f"{fingerprints}")
    prompts = held_out_prompts(held_out.whole(), settings)  # the same on all hosts
    sampled = sample_prompt(settings, config.model, tokenizer, prompts)
    with in_turn("the run has begun"):
        if is_first():
            begin_run(workdir, config, tokenizer)
            fresh = not saved_steps(workdir / CHECKPOINTS)
            write_run_files(workdir, tokenizer, pipeline.rows, prompts, fresh=fresh)
        wait_to_see(lambda: is_run(workdir), f"the run in {workdir}")
    losses = held_out_losses(workdir)
    return TrainingRun(
        config, workdir, resumes, mesh, tokenizer, pipeline, held_out, sampled, losses
    )


def with_model(config: TrainConfig, model: LlamaConfig) -> TrainConfig:
    """The config with the model's shape of the checkpoint that it starts from.

    Raises ConfigError where the config gives another shape.
    """
    if config.model is not None:
        for field in dataclasses.fields(model):
            own, other = getattr(config.model, field.name), getattr(model, field.name)
            # These three only matter to a new model, or may differ from the checkpoint's.
            if field.name not in ("init_std", "scaled_init", "max_context"):
                check(
                    own == other,
                    f"model.{field.name} is {own}, but that of {config.init_from} is {other}: "
                    "leave the model out of the config, or correct it",
                )
    config = dataclasses.replace(config, model=model)
    config.check_model(model)
    return config


def read_data(config: TrainConfig, mesh: Mesh | None) -> tuple[Tokenizer, Pipeline, OnePass]:
    """Tokenizer, training rows and held-out rows; raises ConfigError for bad data."""
    data, length, cache = config.data, config.seq_len, cache_directory()
    tokenizer = make_tokenizer(data, cache=cache).fitted(config.model.vocab_size)
    rows = {
        split: packed_rows(data, tokenizer, seq_len=length, split=split, cache=cache)
        for split in SPLITS
    }
    own = dict(batch_size=config.batch_size, own_B=own_rows(config.batch_size, mesh))
    pipeline = Pipeline(rows["train"], seed=config.seed, **own)
    held_out = OnePass(rows["validation"], max_batches=config.evaluation.batches, **own)
    return tokenizer, pipeline, held_out


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
                    show=lambda done: show(done.step, line(done)),
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


def step_line(config: TrainConfig, devices: int) -> Callable[[StepMetrics], str]:
    """A step's metrics as a line of text."""
    dtype = "float32" if config.dtype == "auto" else config.dtype  # of a product that is timed
    return StepLine(
        num_steps=config.num_steps,
        step_tokens=config.batch_size * config.seq_len,
        step_flops=step_flops(config.model, config.batch_size, config.seq_len, config.lora),
        peak_flops=peak_flops(dtype, devices),
    )
