"""Trains a Llama with layer dropout and the early-exit loss, from scratch or from a checkpoint.

    python train.py --config configs/quickstart.py --workdir runs/quickstart
    python train.py --config configs/quickstart.py --workdir runs/b --optimizer.learning-rate 3e-3
    python decode.py --model runs/quickstart --prompt "import " --strategy self_speculative \\
        --exit-layer 4 --num-draft-tokens 4

The same command again goes on with a run that was stopped. Fields of the configuration are flags:
`python train.py --config configs/quickstart.py --help` lists them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from lsjax.checkpoints import (
    CHECKPOINTS,
    Checkpoints,
    begin_run,
    check_same_run,
    held_out_losses,
    is_run,
    open_checkpoint,
    read_metrics,
    read_run_config,
    saved_steps,
)
from lsjax.cli.errors import one_line_errors
from lsjax.cli.hosts import (
    check_same,
    ending_together,
    in_turn,
    is_first,
    start,
    wait_to_see,
)
from lsjax.cli.run_files import held_out_prompts, sample_prompt, write_run_files
from lsjax.cli.setup import (
    cache_directory,
    exact_products,
    keep_compiled_programs,
    keep_freed_memory,
)
from lsjax.cli.training_hooks import evaluation_hook, sample_hook
from lsjax.cli.training_options import Arguments, parse
from lsjax.cli.training_show import TrainingProgress
from lsjax.config import LlamaConfig, MeshConfig, TrainConfig, check
from lsjax.data.packing import Rows
from lsjax.data.pipeline import make_pipeline, one_pass
from lsjax.data.tokenizer_training import make_tokenizer
from lsjax.sharding import make_mesh, own_rows, placed_rows
from lsjax.training.flops import peak_flops, step_flops
from lsjax.training.metrics_log import MetricsLog, check_board
from lsjax.training.start import abstract_state, check_rows, initial_state
from lsjax.training.step import make_train_step
from lsjax.training.trainer import Interrupted, Loop, TooManySkipped, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input, 1 where training fails, 128 + the signal's
    number where one stopped it."""
    with ending_together(), one_line_errors():
        arguments = parse(sys.argv[1:] if argv is None else argv, __doc__)
        start(arguments.hosts)
        return train(arguments)


def train(arguments: Arguments) -> int:
    """Checks all that can be checked, then compiles and trains."""
    keep_freed_memory()
    console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=not is_first())
    config, workdir = arguments.config, arguments.workdir
    previous = is_run(workdir)
    if previous:
        config = check_same_run(read_run_config(workdir), config, str(workdir))
    if config.init_from and not saved_steps(workdir / CHECKPOINTS):
        config = with_model(config, open_checkpoint(config.init_from).config)
    alone = jax.process_count() == 1 and config.mesh == MeshConfig()
    mesh = None if alone else make_mesh(config.mesh)
    check_rows(config, mesh)
    if config.tensorboard and is_first():
        check_board()
    check_same("the configurations and the states of --workdir", f"{config} {previous}")

    cache = cache_directory()
    own_B = own_rows(config.batch_size, mesh)
    data = dict(seq_len=config.seq_len, cache=cache, own_B=own_B)
    with console.status("reading the data"), in_turn("the data are read"):
        tokenizer = make_tokenizer(config.data, cache=cache).fitted(config.model.vocab_size)
        pipeline = make_pipeline(
            config.data,
            tokenizer,
            batch_size=config.batch_size,
            split="train",
            seed=config.seed,
            **data,
        )
        held_out = one_pass(
            config.data,
            tokenizer,
            batch_size=config.batch_size,
            split="validation",
            max_batches=config.evaluation.batches,
            **data,
        )
    fingerprints = tokenizer.fingerprint, pipeline.rows.fingerprint, held_out.rows.fingerprint
    check_same("the tokenizers and the data", f"{fingerprints}")
    prompts = held_out_prompts(held_out.whole(), config.evaluation)  # the same on all hosts
    if config.evaluation.sample_tokens:
        sampled = sample_prompt(config.evaluation, config.model, tokenizer, prompts)
    with in_turn("the run has begun"):
        if is_first():
            begin_run(workdir, config, tokenizer)
            fresh = not saved_steps(workdir / CHECKPOINTS)
            write_run_files(workdir, tokenizer, pipeline.rows, prompts, fresh=fresh)
        wait_to_see(lambda: is_run(workdir), f"the run in {workdir}")
    console.print(describe(config, workdir, pipeline.rows))

    keep_compiled_programs()
    if config.dtype == "float32":
        exact_products()
    # Under a mesh every device would compute the whole product that is timed. "auto" computes in
    # float32 where a product has to be timed.
    peak = peak_flops(
        "float32" if config.dtype == "auto" else config.dtype, 1 if mesh is None else mesh.size
    )
    losses = held_out_losses(workdir)
    with (
        nullcontext() if mesh is None else jax.set_mesh(mesh),
        Checkpoints(
            workdir / CHECKPOINTS,
            config.checkpoints,
            report=partial(console.print, style="yellow", markup=False),
            losses=losses,
        ) as checkpoints,
    ):
        like = abstract_state(config, mesh)
        restored = checkpoints.restore(like) if previous else None
        if restored is None:
            state, first = initial_state(config, mesh, like), 0
        else:
            state, first = restored.state, restored.step
            pipeline.restore(restored.data)
            # Checkpoints of older versions have no such entry.
            began_with = restored.data.get("held_out", held_out.rows.fingerprint)
            check(
                began_with == held_out.rows.fingerprint,
                "the validation data differ from those that the run began with (fingerprint "
                f"{began_with}, now {held_out.rows.fingerprint}): give the same data, or begin a "
                "new run",
            )
            console.print(f"going on after step {first}")
        place = partial(placed_rows, rows=config.batch_size, mesh=mesh)
        settings = config.evaluation
        hooks = [evaluation_hook(config, list(held_out), workdir, console.print, place, losses)]
        if settings.sample_tokens:
            hooks.append(
                sample_hook(settings, config.model, tokenizer, sampled, console.print, mesh)
            )
        if first == config.num_steps:
            # The program may have been killed while it looked at the last step.
            done = {row["kind"] for row in read_metrics(workdir) if row["step"] == first}
            hooks = [hook for hook in hooks if hook.kind not in done]
            if not hooks:
                console.print(f"all {first} steps are done: nothing to do")
                return 0

        def save(step, state):
            position = {**pipeline.state(), "held_out": held_out.rows.fingerprint}
            checkpoints.save(state, step=step, config=config, data=position)

        progress = TrainingProgress(
            console,
            num_steps=config.num_steps,
            first_step=first,
            step_tokens=config.batch_size * config.seq_len,
            step_flops=step_flops(config.model, config.batch_size, config.seq_len, config.lora),
            peak_flops=peak,
        )
        loop = Loop(
            num_steps=config.num_steps,
            train_step=make_train_step(config),
            next_batch=lambda: place(pipeline.next()),
            save=save,
            wait=checkpoints.settle,
            save_every=config.checkpoints.every,
            hooks=hooks,
            max_skipped=config.max_skipped,
            show=progress.show,
        )
        log = MetricsLog(
            workdir if is_first() else None, from_step=first, tensorboard=config.tensorboard
        )
        try:
            with progress:
                run(loop, state, log)
        except Interrupted as stopped:
            checkpoints.wait()
            console.print(
                f"stopped after step {stopped.step}, which is saved: the same command goes on"
            )
            return stopped.code
        except TooManySkipped as failure:
            console.print(f"error: {failure}", style="bold red", markup=False)
            return 1
        finally:
            log.close()
    console.print(f"done: python decode.py --model {workdir} --prompt ...", markup=False)
    return 0


def with_model(config: TrainConfig, model: LlamaConfig) -> TrainConfig:
    """The config with the shape of the checkpoint that it starts from.

    Raises ConfigError where it gives another one.
    """
    if config.model is not None:
        for field in dataclasses.fields(model):
            own, other = getattr(config.model, field.name), getattr(model, field.name)
            # What only a new model is made with, or how far a checkpoint says it reaches.
            if field.name not in ("init_std", "scaled_init", "max_context"):
                check(
                    own == other,
                    f"model.{field.name} is {own}, but that of {config.init_from} is {other}: "
                    "leave the model out of the config, or correct it",
                )
    config = dataclasses.replace(config, model=model)
    config.check_model(model)
    return config


def describe(config: TrainConfig, workdir: Path, rows: Rows) -> str:
    """Two lines: the model and the data."""
    tokens = config.num_steps * config.batch_size * config.seq_len
    return (
        f"{workdir}: {config.model.num_params / 1e6:.1f}M parameters, {config.model.num_layers} "
        f"layers; {config.num_steps} steps of {config.batch_size} x {config.seq_len} tokens, "
        f"{tokens / len(rows) / rows.seq_len:.2g} passes over\n{rows.describe()}"
    )


if __name__ == "__main__":
    sys.exit(main())
