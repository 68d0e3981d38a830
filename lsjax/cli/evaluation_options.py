"""What can be asked of lsjax.cli.evaluate, and the task that this makes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lsjax.cli.flags import ModelFlags, SamplingFlags, StrategyFlags, check_sampling
from lsjax.config import check
from lsjax.decoding.sampling import GREEDY
from lsjax.evaluation.tasks.all_tasks import TASKS
from lsjax.evaluation.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Arguments(StrategyFlags, ModelFlags):
    """A task at several exits and with several strategies."""

    task: Literal[tuple(TASKS)]  # type: ignore[valid-type]
    """What is asked."""
    output: Path
    """A line of JSON an answer (.jsonl); the summary goes beside it, as .summary.json. If it holds
    answers to the same questions, the rest is done."""
    data: tuple[str, ...] = ()
    """Files of rows or patterns: .jsonl, .tsv, .csv, each also as .gz. By default the task's
    TensorFlow data set."""
    tfds_split: str | None = None
    """Another split of that."""
    tfds_data_dir: str = ""
    """Where TensorFlow data sets lie; empty is TFDS's own, ~/tensorflow_datasets."""
    offset: int = 0
    """Leaves out the first so many examples."""
    limit: int | None = None
    """At most so many examples."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that can't be asked; either way it is named."""
    prompt_template: str | None = None
    """The prompt of a row, its fields in braces. By default that of the run, if the model is one
    that was finetuned on rows with these fields, else the task's."""
    response_template: str | None = None
    """The response to compare with, likewise."""
    num_shots: int | None = None
    """Examples with their responses before each prompt; the task's own number by default."""
    shots_data: tuple[str, ...] = ()
    """Files that the shots are drawn from."""
    without_seen: tuple[str, ...] = ()
    """Files of training rows: figures also for the examples whose prompt is not among them."""
    groups: bool = False
    """Shows each category of the examples too; the summary has them in any case."""
    max_new_tokens: int | None = None
    """Ends a text that does not end by itself; the task's own number by default."""
    sampling: SamplingFlags = GREEDY
    num_samples: int = 1
    """Texts for each example; a score is the mean over them."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text where it would contain this, beside what the task says; may be given several
    times."""
    allow_code_execution: bool = False
    """Runs the texts of human_eval against its tests, with limits that guard against accidents; it
    is no security boundary (docs/evaluation.md)."""
    chat: bool = False
    """Puts prompts into the model's chat template."""
    system: str | None = None
    """With --chat: the system message."""


def check_numbers(arguments: Arguments) -> None:
    """Raises ConfigError for numbers that cannot work, and for those that mean nothing."""
    for name, low in (("offset", 0), ("limit", 1), ("num_shots", 0)):
        value = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        check(value is None or value >= low, f"{flag} {value} is below {low}: choose {low} up")
    check(
        arguments.output.suffix == ".jsonl",
        f"--output {arguments.output} is no .jsonl: it gets a line of JSON an answer",
    )
    check(arguments.chat or arguments.system is None, "--system needs --chat: give both or none")
    check_sampling(arguments.sampling, arguments.num_samples)


def with_options(task: Task, arguments: Arguments) -> Task:
    """The task with the numbers and stop strings that the arguments give."""
    changes = {
        name: value
        for name in ("max_new_tokens", "num_shots", "prompt_template", "response_template")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.allow_code_execution:
        check(
            task.score_by_running is not None,
            f"--allow-code-execution means nothing to {task.name}, whose texts are no programs",
        )
        changes["score"] = task.score_by_running
    return dataclasses.replace(task, stop=task.stop + arguments.stop, **changes)
