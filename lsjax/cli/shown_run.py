"""A training run with its progress, exits and pictures: what train.py and `lsjax.train` show."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lsjax.aot.remat import with_remat
from lsjax.checkpoints.run import EVALUATION, read_metrics
from lsjax.cli.drafts import legend, marked, show_unmarked
from lsjax.cli.show import exit_table
from lsjax.config import AnyPath, ConfigError, TrainConfig
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation import exits, plots
from lsjax.model.llama import Llama
from lsjax.terminal import verbatim
from lsjax.training.early_exit import exits_with_loss
from lsjax.training.hosts import is_first
from lsjax.training.metrics import paced
from lsjax.training.prepare import TrainingRun, prepare_run
from lsjax.training.recipe import PAPER, Recipe
from lsjax.training.run import Hook, Interrupted, Show, TooManySkipped, train_run
from lsjax.training.step import TrainState
from lsjax.training.writer import Writer

PICTURES = EXITS, CURVES = "exits.png", "training.png"  # of a run's directory
MakeHook = Callable[[TrainingRun], Hook]


def shown_run(
    config: TrainConfig,
    workdir: AnyPath,
    console: Console,
    recipe: Recipe = PAPER,
    *,
    samples: bool = True,
    hooks: Sequence[MakeHook] | None = None,
    began: float | None = None,
) -> TrainState:
    """Trains or resumes the run in `workdir`; returns the state after the last step.

    samples: whether the configured samples are written. hooks: by default those that score and plot
    the exits, and write samples. began: Unix time at which the program began. Raises as
    `prepare_run`, `Writer`, `with_remat` and `train_run`.
    """
    say, warn = console.print, partial(console.print, style="yellow")
    if hooks is None:
        hooks = [partial(shown_evaluation, console=console)]
        if config.evaluation.sample_tokens > 0 and samples:  # on all hosts, or on none
            hooks.append(partial(shown_sample, console=console))
    with Writer(workdir, warn) as writer:
        with console.status("reading the data"):
            run = prepare_run(config, writer, recipe, warn)
        watch = partial(shown_progress, console=console)
        run = with_remat(run, say)
        return train_run(run, make_hooks=hooks, watch=watch, say=say, warn=warn, began=began)


def shown_evaluation(run: TrainingRun, console: Console) -> Hook:
    """`evaluation_hook` that prints the scores, and plots loss and agreement by exit."""
    workdir, pictures = run.workdir, Pictures(console)

    def show(step: int, scores: exits.ExitScores) -> None:
        title = f"step {step}, {scores.tokens:,} held-out tokens"
        console.print(exit_table(title, {workdir.name: scores}))
        console.print(exits.AGREEMENT, style="dim")
        if not is_first():
            return
        row = {"kind": EVALUATION, "step": step, **asdict(scores)}
        try:
            plots.plot_exits(
                {f"step {step}": plots.estimates(scores.loss_E)},
                {f"step {step}": plots.estimates(scores.agreement_E)},
                workdir / EXITS,
                trained=exits_of(run),
                title=workdir.name,
            )
            rows = [*read_metrics(workdir), row]
            plots.plot_training(rows, workdir / CURVES, title=workdir.name)
            pictures.show(workdir / EXITS, workdir / CURVES)
        except (ConfigError, OSError) as error:  # no matplotlib, full disk: metrics.jsonl has it
            console.print(str(error), style="dim")

    return exits.evaluation_hook(run, show)


def exits_of(run: TrainingRun) -> tuple[int, ...]:
    """Exits with a loss in training, besides the last one, or with a block."""
    config, layers = run.config, run.config.model.num_layers
    weights = run.recipe.exit_weights
    with_loss = exits_with_loss(config.early_exit, layers, config.num_steps, weights)
    return config.exit_blocks.exits or with_loss


def default_exit(run: TrainingRun) -> int:
    """The exit that drafts samples: of those with a loss, the one closest to L / 4."""
    layers = run.config.model.num_layers
    exits = exits_of(run) or range(1, max(2, layers))
    return min(exits, key=lambda exit_layer: abs(exit_layer - layers / 4))


def shown_sample(run: TrainingRun, console: Console) -> Hook:
    """Hook that continues a prompt by self-speculation, and prints the text in colours."""
    config, model_config = run.config.evaluation, run.config.model
    exit_layer = config.exit_layer or default_exit(run)
    prompt, tokenizer = run.sample_prompt, run.tokenizer
    length = min(config.sample_tokens, model_config.max_context - len(prompt))
    engine: Engine | None = None

    def sample(step: int, model: Llama) -> dict[str, Any]:
        nonlocal engine  # holds the run's own arrays, which the next step overwrites
        if engine is None:
            strategy = SelfSpeculative(exit_layer, config.num_draft_tokens)
            engine = Engine(
                model,
                tokenizer,
                strategy,
                mesh=run.mesh,
                lay_out=False,
                kernels=run.config.kernels,
            )
        else:
            engine.use_model(model)
        (done,) = engine.generate([prompt], max_new_tokens=length)
        console.print(legend(console, engine.strategy))
        console.print(verbatim(tokenizer.decode(prompt)), style="dim")
        console.print(marked(console, tokenizer, prompt, done))
        console.print()
        show_unmarked(console, tokenizer.decode(prompt) + done.text)
        drafts = f"{done.accepted} of {done.drafted} drafts of exit {exit_layer} were accepted"
        console.print(drafts, style="dim")
        names = ("text", "exit_layer", "num_draft_tokens", "acceptance_rate")
        return {name: getattr(done, name) for name in names}

    return Hook("sample", config.every, sample)


@contextmanager
def shown_progress(run: TrainingRun, first: int, console: Console) -> Iterator[Show]:
    """Shows a progress bar in a terminal or a notebook, and occasional lines elsewhere."""
    num_steps = run.config.num_steps
    has_bars = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    if not has_bars:
        yield paced(console.print, num_steps)
        return
    with Progress(BarColumn(20), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("compiling", total=num_steps, completed=first)
        yield lambda step, line: bar.update(task, completed=step, description=line)


def to_its_end(work: Callable[[], Any], console: Console) -> int:
    """Runs work that trains, and prints why it ended early. Returns the exit code: 1 if training
    failed, 128 + the number of a signal that stopped it, or 0."""
    try:
        work()
    except Interrupted as stopped:
        console.print(f"{stopped}: the same command resumes it")
        return 128 + stopped.number
    except TooManySkipped as failure:
        console.print(f"error: {failure}", style="bold red")
        return 1
    return 0


class Pictures:
    """Pictures of a run in a notebook, which new ones replace. Elsewhere they are only files."""

    def __init__(self, console: Console):
        self._shown: dict[str, Any] = {}  # by the name of the file
        self._shows = console.is_jupyter and not console.quiet

    def show(self, *files: AnyPath) -> None:
        """Shows PNG files, in the places of earlier ones of these names."""
        if not self._shows:
            return
        from IPython.display import Image, display

        for file in files:
            picture = Image(file.read_bytes(), width=900)
            if file.name in self._shown:
                self._shown[file.name].update(picture)
            else:
                self._shown[file.name] = display(picture, display_id=True)
