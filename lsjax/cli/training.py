"""The command line of train.py: its flags, and what people see of a run."""

import argparse
import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lsjax.checkpoints.run import EVALUATION, read_metrics
from lsjax.cli.flags import parse_flags
from lsjax.cli.show import coloured, exit_table, verbatim
from lsjax.config import ConfigError, TrainConfig, check
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.exits import AGREEMENT, ExitScores, evaluation_hook
from lsjax.evaluation.plots import plot_exits, plot_training
from lsjax.model.llama import Llama
from lsjax.training.hosts import Hosts, is_first
from lsjax.training.metrics import paced
from lsjax.training.prepare import TrainingRun
from lsjax.training.run import Hook, Show


@dataclass(frozen=True)
class TrainingFlags:
    """Flags of train.py."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    distributed: Hosts = Hosts()


def parse(argv: Sequence[str], description: str) -> tuple[TrainConfig, Path, Hosts]:
    """Reads `--config FILE --workdir DIRECTORY` and any field of the configuration.

    Raises ConfigError for what is wrong with the file, a flag or a value.
    """
    more = {"--workdir": dict(type=Path, metavar="DIRECTORY", help="of the run")}
    known, default, rest = read_config("train.py", description, argv, more)
    flags = parse_flags(
        TrainingFlags,
        rest,
        description,
        default=TrainingFlags(default),
        config=(tyro.conf.AvoidSubcommands,),
    )
    check(known.workdir is not None, "--workdir is missing: name the directory of the run")
    return flags.config, known.workdir, flags.distributed


def read_config(
    prog: str, description: str, argv: Sequence[str], more: Mapping[str, dict[str, Any]]
) -> tuple[argparse.Namespace, TrainConfig, list[str]]:
    """Reads `--config FILE`, and flags that are no fields of it, before all else.

    more: these flags, with their options for argparse. Returns the flags, the configuration of the
    file, and the other arguments. Raises ConfigError where no file is named, and for what is wrong
    with it.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configs/NAME.py")
    for name, options in more.items():
        parser.add_argument(name, **options)
    known, rest = parser.parse_known_args(argv)
    if known.config is None and {"-h", "--help"} & {*rest}:
        parser.print_help()
        raise SystemExit(0)
    check(bool(known.config), "--config is missing: name a file such as configs/quickstart.py")
    return known, read_config_file(known.config), rest


def read_config_file(file: Path) -> TrainConfig:
    """The `config` of a Python file.

    Raises ConfigError, with the line, where the file fails or holds none, and for a value of
    another type than its field's: 5e4 is no whole number.
    """
    check(file.is_file(), f"--config {file} is no file: name one such as configs/quickstart.py")
    try:
        found = runpy.run_path(str(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else "?")
        raise ConfigError(f"{file}:{line}: {type(error).__name__}: {error}") from None
    config = found.get("config")
    check(
        isinstance(config, TrainConfig),
        f"{file}: has no `config` that is a TrainConfig: set config = TrainConfig(...)",
    )
    return config


def shown_hooks(config: TrainConfig, console: Console) -> list[Callable[[TrainingRun], Hook]]:
    """Evaluation with a table and plots, and samples if the configuration asks for them."""
    makers = [shown_evaluation, *[shown_sample] * (config.evaluation.sample_tokens > 0)]
    return [partial(maker, console=console) for maker in makers]


def shown_evaluation(run: TrainingRun, console: Console) -> Hook:
    """`evaluation_hook`; prints the scores, and plots loss and agreement by exit."""
    workdir = run.workdir

    def show(step: int, scores: ExitScores) -> None:
        title = f"step {step}, {scores.tokens:,} held-out tokens"
        console.print(exit_table(title, {workdir.name: scores}))
        console.print(AGREEMENT, style="dim")
        if not is_first():
            return
        row = {"kind": EVALUATION, "step": step, **asdict(scores)}
        try:
            plot_exits({f"step {step}": scores}, workdir / "exits.png", title=workdir.name)
            plot_training([*read_metrics(workdir), row], workdir / "training.png")
        except (ConfigError, OSError) as error:  # no matplotlib, no room: metrics.jsonl has it all
            console.print(str(error), style="dim")

    return evaluation_hook(run, show)


def shown_sample(run: TrainingRun, console: Console) -> Hook:
    """Lets the model continue a prompt, drafting by an early exit, and shows it in colours."""
    config, model_config = run.config.evaluation, run.config.model
    exit_layer = config.exit_layer or max(1, model_config.num_layers // 4)
    prompt, tokenizer = run.sample_prompt, run.tokenizer
    length = min(config.sample_tokens, model_config.max_context - len(prompt))
    engine: Engine | None = None

    def sample(step: int, model: Llama) -> dict[str, Any]:
        nonlocal engine  # holds the run's own arrays, which the next step overwrites
        if engine is None:
            strategy = SelfSpeculative(exit_layer, config.num_draft_tokens)
            engine = Engine(model, tokenizer, strategy, mesh=run.mesh, lay_out=False)
        else:
            engine.use_model(model)
        (done,) = engine.generate([prompt], max_new_tokens=length)
        console.print(verbatim(tokenizer.decode(prompt)), style="dim")
        console.print(coloured(tokenizer, prompt, done))
        drafts = f"{done.accepted} of {done.drafted} drafts of exit {exit_layer} were accepted"
        console.print(drafts, style="dim")
        return {
            "text": done.text,
            "exit_layer": exit_layer,
            "num_draft_tokens": config.num_draft_tokens,
            "acceptance_rate": done.acceptance_rate,
        }

    return Hook("sample", config.every, sample)


@contextmanager
def shown_progress(run: TrainingRun, first: int, console: Console) -> Iterator[Show]:
    """A line that moves in a terminal, and a line now and then elsewhere."""
    num_steps = run.config.num_steps
    if not console.is_terminal:
        yield paced(console.print, num_steps)
        return
    with Progress(BarColumn(20), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("compiling", total=num_steps, completed=first)
        yield lambda step, line: bar.update(task, completed=step, description=line)
