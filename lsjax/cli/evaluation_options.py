"""What can be asked of lsjax.cli.evaluate, and the task that this makes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lsjax.cli.strategies import StrategyName
from lsjax.config import MeshConfig, check
from lsjax.evaluation.tasks.all_tasks import TASKS
from lsjax.evaluation.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A task at several exits and with several strategies."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run (RUN@200, RUN@best)."""
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
    strategies: tuple[StrategyName, ...] = ("autoregressive",)
    """One or several, in turns."""
    exit_layers: tuple[int, ...] = ()
    """Each is tried with early_exit and self_speculative. Self-speculation alone may take it from
    the model's generation_config.json."""
    num_draft_tokens: int | None = None
    """Tokens drafted in a round (from the model, if it says so)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only (lsjax.cli.count_tokens)."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability."""
    max_new_tokens: int | None = None
    """Ends a text that does not end by itself; the task's own number by default."""
    temperature: float = 0.0
    """0 is greedy. Above 0 tokens are drawn, with logits divided by this."""
    top_k: int = 0
    """Draws from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draws from the fewest tokens whose probabilities sum up to p."""
    min_p: float = 0.0
    """Draws from tokens at least min_p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that were there before, and multiplies those below."""
    no_repeat_ngram: int = 0
    """Says no n-gram of this size twice; 0 allows all."""
    num_samples: int = 1
    """Texts for each example; a score is the mean over them."""
    seed: int = 0
    """Of the choice of shots, and of the first sampled text; each further one has the next."""
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
    batch_size: int = 1
    """Texts decoded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    stack_layers: bool = False
    """Runs the layers in a loop, as decode.py --stack-layers does."""
    max_length: int | None = None
    """Of prompt and new tokens together; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to run on; one by default."""


def check_numbers(arguments: Arguments) -> None:
    """Raises ConfigError for numbers that cannot work, and for those that mean nothing."""
    for name, low in (("offset", 0), ("limit", 1), ("num_shots", 0), ("num_samples", 1)):
        value = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        check(value is None or value >= low, f"{flag} {value} is below {low}: choose {low} up")
    check(
        arguments.output.suffix == ".jsonl",
        f"--output {arguments.output} is no .jsonl: it gets a line of JSON an answer",
    )
    check(arguments.chat or arguments.system is None, "--system needs --chat: give both or none")
    if arguments.temperature == 0:
        for name, plain in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("num_samples", 1)):
            check(
                getattr(arguments, name) == plain,
                f"--{name.replace('_', '-')} means nothing to greedy decoding: choose a "
                "--temperature above 0",
            )


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
