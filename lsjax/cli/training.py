"""Command line of train.py: its flags and its output."""

import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lsjax.checkpoints.run import EVALUATION, read_metrics
from lsjax.cli.setup import parse_flags
from lsjax.cli.show import coloured, exit_table
from lsjax.config import AnyPath, Checked, ConfigError, TrainConfig, check
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation import exits, plots
from lsjax.model.llama import Llama
from lsjax.terminal import verbatim
from lsjax.training.hosts import Hosts, is_first
from lsjax.training.metrics import paced
from lsjax.training.prepare import TrainingRun
from lsjax.training.run import Hook, Show

T = TypeVar("T", bound="ConfigFile")
ConfigFields = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Checked, prefix="--"):
    """Configuration file. Its fields are also flags: --config FILE --help lists them."""

    config: AnyPath | None = None
    """configs/NAME.py"""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(ConfigFile):
    """Flags of train.py."""

    workdir: AnyPath | None = None
    """Directory of the run; required."""
    distributed: Hosts = Hosts()
    fields: ConfigFields


def parse_config(
    kind: type[T],
    argv: Sequence[str] | None,
    description: str,
    early: type[ConfigFile] = ConfigFile,
    derived: Callable[[Any], dict[str, Any]] = lambda found: {},
) -> T:
    """Flags of a `kind` with the fields of its --config file.

    early: flags that are read before all others. derived: other defaults of `kind`, made from
    these. Raises ConfigError for a bad file, flag or value.
    """
    found, rest = parse_flags(early, argv, "", return_unknown_args=True, add_help=False)
    if found.config is None and {"-h", "--help"} & {*rest}:
        parse_flags(early, ["--help"], description)
    check(bool(found.config), "--config is missing: name a file such as configs/quickstart.py")
    default = kind(fields=read_config_file(found.config), **derived(found))
    config = (tyro.conf.AvoidSubcommands,)
    return parse_flags(kind, argv, description, default=default, config=config)


def read_config_file(file: AnyPath) -> TrainConfig:
    """The `config` of a Python file. Raises ConfigError, with the line, if the file is missing or
    fails, defines no `config`, or gives a field a value that it rejects."""
    try:
        config = runpy.run_path(str(file)).get("config")
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
        where = f"{file}:{line}" if line else f"--config {file}"
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from None
    check(
        isinstance(config, TrainConfig),
        f"{file}: `config` is missing or of another type: set config = TrainConfig(...)",
    )
    return config


def shown_evaluation(run: TrainingRun, console: Console) -> Hook:
    """`evaluation_hook` that prints the scores, and plots loss and agreement by exit."""
    workdir = run.workdir

    def show(step: int, scores: exits.ExitScores) -> None:
        title = f"step {step}, {scores.tokens:,} held-out tokens"
        console.print(exit_table(title, {workdir.name: scores}))
        console.print(exits.AGREEMENT, style="dim")
        if not is_first():
            return
        row = {"kind": EVALUATION, "step": step, **asdict(scores)}
        try:
            plots.plot_exits({f"step {step}": scores}, workdir / "exits.png", title=workdir.name)
            plots.plot_training([*read_metrics(workdir), row], workdir / "training.png")
        except (ConfigError, OSError) as error:  # no matplotlib, full disk: metrics.jsonl has it
            console.print(str(error), style="dim")

    return exits.evaluation_hook(run, show)


def shown_sample(run: TrainingRun, console: Console) -> Hook:
    """Hook that continues a prompt by self-speculation, and prints the text in colours."""
    config, model_config = run.config.evaluation, run.config.model
    exit_layer = config.exit_layer or max(1, model_config.num_layers // 4)
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
        console.print(verbatim(tokenizer.decode(prompt)), style="dim")
        console.print(coloured(tokenizer, prompt, done))
        console.print()
        drafts = f"{done.accepted} of {done.drafted} drafts of exit {exit_layer} were accepted"
        console.print(drafts, style="dim")
        names = ("text", "exit_layer", "num_draft_tokens", "acceptance_rate")
        return {name: getattr(done, name) for name in names}

    return Hook("sample", config.every, sample)


@contextmanager
def shown_progress(run: TrainingRun, first: int, console: Console) -> Iterator[Show]:
    """Shows a progress bar in a terminal, and occasional lines elsewhere."""
    num_steps = run.config.num_steps
    if not console.is_terminal:
        yield paced(console.print, num_steps)
        return
    with Progress(BarColumn(20), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("compiling", total=num_steps, completed=first)
        yield lambda step, line: bar.update(task, completed=step, description=line)
