"""Answers whether LayerSkip pays for a model, a text and a budget, on one page.

    lsjax report --model PATH --data.paths 'texts/*.txt' --minutes 60 --output report
    lsjax report --model PATH --task gsm8k --data.paths train.jsonl --minutes 60 --output report
    lsjax report --model PATH --no-training --data.paths 'texts/*.txt' --output report
    lsjax report --compare reports/a reports/b --output compared

It trains with LayerSkip, and without it on as many tokens. It scores every exit of both on held-out
text, and decodes held-out prompts with autoregressive decoding, with every exit and draft length,
and with auto. The directory --output gets report.html, report.md, report.json and the runs.

The number of training steps is fixed in the first minutes, so that all of it takes --minutes. The
same command resumes a killed report. Fields of the training's configuration are flags: --help-all
lists them. --config replaces the recipe that is chosen for the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from typing import Any

import tyro

from lsjax.cli.flags.config_file import ConfigFields, found_config, read_config_file
from lsjax.cli.flags.evaluate import TaskName
from lsjax.cli.flags.parse import Program, parse_as, parse_known
from lsjax.config import (
    AnyPath,
    Checked,
    DataConfig,
    TrainConfig,
    as_path,
    bounded,
    check,
    split_step,
)
from lsjax.config.train import FILES

# Sources by the last suffix of a file, apart from .gz. Other files are text.
SOURCES = {".jsonl": "jsonl", ".tsv": "tsv", ".csv": "tsv", ".array_record": "array_record"}
# Tasks whose rows become training examples by their templates alone.
TRAINABLE = ("gsm8k", "topv2", "pairs", "xsum_summarization", "cnn_dm_summarization")
MANY_FILES = 40  # from as many text files on, each is one document


@dataclass(frozen=True, kw_only=True)
class Given(Checked, prefix="--"):
    """Flags that decide about the defaults of the others."""

    output: AnyPath | None = None
    """Directory of the report; required."""
    model: AnyPath | None = None
    """Model to train further or, with --no-training, to report on: a Hugging Face directory, a
    .gguf file or a run. Without it, training starts from random weights of the shape in --config.
    """
    config: AnyPath | None = None
    """Configuration of the training, a file or a name such as quickstart; by default a recipe is
    chosen for the model."""
    task: TaskName | None = None
    """Task that the data are rows of (docs/evaluation.md). It gives their templates and a score."""
    compare: tuple[AnyPath, ...] = ()
    """Reports to show on one page, with their differences; nothing is trained. Runs and models are
    measured first, on the held-out data of the first run."""
    training: bool = True
    """Whether to train. --no-training reports on the model as it is."""


@dataclass(frozen=True, kw_only=True)
class GivenData(Checked, prefix="--data."):
    """Flags of the data that decide about its defaults."""

    source: str | None = None
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Early(Given):
    """What is read before all other flags."""

    data: GivenData = GivenData()


@dataclass(frozen=True, kw_only=True)
class Arguments(Given):
    """Flags of lsjax report."""

    minutes: float | None = bounded(None, low=1, hint="the first steps and tokens take a minute")
    """Time for all of it; 60 by default. A --config without --minutes keeps its number of steps."""
    seeds: int = bounded(1, low=1)
    """Number of trainings of each kind, with the seeds 0, 1 and so on."""
    prompts: int | None = bounded(None, low=1)
    """Number of held-out prompts to decode; by default what the time allows, from 8 to 32."""
    new_tokens: int | None = bounded(None, low=2)
    """New tokens of each text, or the most of an answer; by default 64, or the task's own number.
    """
    exit_layers: tuple[int, ...] = ()
    """Exits of the static settings; by default those with a loss in training."""
    num_draft_tokens: tuple[int, ...] = bounded((2, 4, 8), low=1)
    """Draft lengths of the static settings."""
    temperature: float | None = bounded(None, low=0, high=1e30)
    """Temperature of sampling; 0 is greedy. Default: 1 for text, whose greedy continuations repeat
    themselves, and 0 for tasks."""
    fields: ConfigFields


@dataclass(frozen=True, kw_only=True)
class Parsed(Checked):
    """The flags, and the configuration of the training before its own flags changed it. Both are
    None for --compare."""

    given: Given
    flags: Arguments | None = None
    base: TrainConfig | None = None


def parse_report(program: Program, argv: Sequence[str]) -> Parsed:
    """Flags of a report and fields of its training. Raises ConfigError and CheckpointError."""
    early, _ = parse_known(Early, argv)
    if early.compare or (early.model is None and early.config is None):
        program.show_help(argv)
        check(
            bool(early.compare),
            "--model is missing: name a model to train further, or the --config of a new one",
        )
        return Parsed(given=parse_as(Given, argv))
    check(
        early.training or early.model is not None,
        "--no-training needs --model: name the model to report on",
    )
    base = base_config(
        early.model,
        early.training,
        early.config and read_config_file(found_config(early.config)),
        partial(data_config, early),
    )
    program.show_help(argv, base)
    default, settings = Arguments(fields=base), (tyro.conf.AvoidSubcommands,)
    found = parse_as(Arguments, argv, default=default, config=settings)
    return Parsed(given=found, flags=found, base=base)


def base_config(
    model: AnyPath | None,
    training: bool,
    config: TrainConfig | None,
    data: Callable[[DataConfig | None], DataConfig],
) -> TrainConfig:
    """The configuration that other flags change: the given one, that of the run `model` if nothing
    is trained, or a recipe for the model. data: changes the data of a configuration or run."""
    # They import jax.
    from lsjax.checkpoints import open_checkpoint
    from lsjax.checkpoints.run import is_run, read_run_config
    from lsjax.reporting import recipes

    if config is not None:
        given = {}
        if model is not None:
            given = {"init_from": str(model), "model": open_checkpoint(model).config}
        return replace(config, data=data(config.data), **given)
    directory, _ = split_step(model)
    own = read_run_config(directory) if is_run(directory) else None
    if own is not None and not training:
        return replace(own, data=data(own.data))
    shape = open_checkpoint(model).config
    return recipes.recipe(shape, str(model), data(own and own.data), recipes.SAMPLE_STEPS)


def data_config(early: Early, own: DataConfig | None) -> DataConfig:
    """The data: the source that the suffix of the files tells, and the templates of the task.

    own: of the configuration or run. Raises ConfigError if there are no data.
    """
    settings, paths, source = templates_of(early.task), early.data.paths, early.data.source
    # Whether the run or configuration reads rows of this task already.
    has_rows = own is not None and bool(own.paths) and replace(own, **settings) == own
    if early.model is not None:
        settings["tokenizer"] = str(early.model)
    if early.task is not None and not (paths or has_rows) and source in (None, "tfds"):
        from lsjax.evaluation.tasks import TASKS

        name = TASKS[early.task].tfds
        check(name is not None, f"{early.task} has no data set: name files with --data.paths")
        return DataConfig(source="tfds", tfds_name=name, **settings)
    if own is not None and (not paths or own.source in FILES):
        return replace(own, **{**settings, "tokenizer": own.tokenizer})
    check(
        bool(paths) or source is not None,
        "there are no data: name files with --data.paths, or a --data.source",
    )
    if source in FILES:
        return DataConfig(source=source, paths=paths, **settings)
    if source is not None:  # its own flags say the rest
        return DataConfig(tokenizer=settings.get("tokenizer", DataConfig.tokenizer))
    suffix = as_path(paths[0].removesuffix(".gz")).suffix
    source = SOURCES.get(suffix, "text")
    if source == "text" and sum(len(glob(one, recursive=True)) for one in paths) < MANY_FILES:
        settings["separator"] = "blank_line"
    return DataConfig(source=source, paths=paths, **settings)


def templates_of(task: TaskName | None) -> dict[str, Any]:
    """Fields of the data that a task decides about. Raises ConfigError for a task whose rows or
    scores need more than templates and a reference."""
    if task is None:
        return {}
    from lsjax.evaluation.tasks import TASKS, TEMPLATES

    check(
        task in TRAINABLE,
        f"--task {task} is for lsjax evaluate only: choose from {', '.join(TRAINABLE)}, or give "
        "--data.prompt-template and --data.response-template",
    )
    return {name: getattr(TASKS[task], name) for name in TEMPLATES}


PROGRAM = Program(
    "report",
    "lsjax.cli.report:report",
    Arguments,
    __doc__,
    common="""
        model output minutes task data.source data.paths data.prompt_template config
        training seeds compare exit_layers num_draft_tokens prompts new_tokens temperature
        num_steps batch_size seq_len early_exit.exits
    """,
    usage="--model PATH --data.paths FILES --output DIRECTORY",
    parse=parse_report,
)
