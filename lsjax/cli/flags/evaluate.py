"""Answers a task at several exits and with several strategies, and scores it.

    lsjax evaluate --model RUN --task topv2 --data topv2/test.tsv --limit 1000 \\
        --strategies autoregressive early_exit self_speculative --exit-layers 8 15 23 \\
        --num-draft-tokens 4 --without-seen topv2/train.tsv --output topv2.jsonl

The same command resumes a killed run. docs/evaluation.md explains the tasks and the figures.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lsjax.cli.flags.parse import Program
from lsjax.cli.flags.shared import ChatFlags, ModelFlags, SamplingFlags, StrategyFlags
from lsjax.config import GREEDY, AnyPath, bounded

# Keys of `TASKS` in lsjax/evaluation/tasks.py, which imports jax.
TaskName = Literal[
    "cnn_dm_summarization",
    "xsum_summarization",
    "cnn_dm_lm",
    "human_eval",
    "topv2",
    "gsm8k",
    "spec_bench",
    "pairs",
]


@dataclass(frozen=True, kw_only=True)
class TaskFlags(ChatFlags, ModelFlags):
    """Examples of a task, and how they become prompts."""

    data: tuple[str, ...] = ()
    """Files or patterns of rows: .jsonl, .tsv, .csv, also .gz. Default: the task's set in TFDS."""
    tfds_data_dir: str = ""
    """Directory of TensorFlow data sets; empty means TFDS's default, ~/tensorflow_datasets."""
    offset: int = bounded(0, low=0)
    """Number of examples to skip at the start."""
    limit: int | None = bounded(None, low=1)
    """Maximum number of examples."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Whether to stop at a row that is invalid or too long, or to report and skip it."""
    prompt_template: str | None = None
    """Prompt of a row, with its fields in braces: '{question}'. Default: the template that the run
    was finetuned with, if its fields fit, or else the task's."""
    response_template: str | None = None
    """Response to compare with, written like --prompt-template."""
    num_shots: int | None = bounded(None, low=0)
    """Solved examples before each prompt; the task's own number by default."""
    shots_data: tuple[str, ...] = ()
    """Files to draw the shots from, with --seed."""
    without_seen: tuple[str, ...] = ()
    """Files of training rows. Adds figures for the examples whose prompts are not in them."""
    sampling: SamplingFlags = GREEDY
    groups: bool = False
    """Also prints each category of examples. Files always contain them."""


@dataclass(frozen=True, kw_only=True)
class Arguments(TaskFlags, StrategyFlags):
    """Evaluates a task at several exits and with several strategies."""

    task: TaskName
    """Task to evaluate (docs/evaluation.md)."""
    output: AnyPath
    """File of answers, one JSON line each (.jsonl). The summary is written beside it, as
    .summary.json. If the file has answers from the same settings, only missing ones are added."""
    max_new_tokens: int | None = bounded(None, low=1)
    """Maximum number of new tokens; the task's own number by default."""
    num_samples: int = bounded(1, low=1)
    """Number of texts per example; scores are means over them."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text before this string, in addition to the task's strings; may be repeated."""
    allow_code_execution: bool = False
    """Runs the texts of human_eval against its tests. The limits guard against accidents; they are
    not a security boundary (docs/evaluation.md)."""


PROGRAM = Program(
    "evaluate",
    "lsjax.cli.evaluate:evaluate",
    Arguments,
    __doc__,
    common="""
        model task data output strategies exit_layers num_draft_tokens limit num_shots
        prompt_template response_template batch_size
    """,
    usage="--model PATH --task NAME --output FILE",
)
