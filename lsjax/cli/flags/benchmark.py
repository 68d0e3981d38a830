"""Compares strategies on the same prompts: speed, ideal speedup, and exactness.

    lsjax benchmark --model PATH --exit-layers 4 8 --num-draft-tokens 4 8
    lsjax benchmark --model PATH --identity-tail 2 --exit-layers 2 4 8 15 \\
        --num-draft-tokens 2 4 8 12 --draft-vocab 2048
    lsjax benchmark --model PATH --task spec_bench --data question.jsonl --groups \\
        --exit-layers 8 --num-draft-tokens 4 --repeats 1 --output benchmarks/model
    lsjax benchmark --model PATH --rows 1 8 32 64 --exit-layers 8 \\
        --num-draft-tokens 1 2 4

After a warm-up, autoregressive decoding and every exit with every draft length take turns in one
process. docs/performance.md defines the columns. Greedy texts are compared with autoregressive
decoding. Exit code 1: in float32 they differ by more than rounding explains.

The directory --output gets answers.jsonl (a line per text, from which a killed run resumes),
cells.jsonl (the table), and benchmark.png if there are several cells.

With --rows it times rounds of many rows instead of texts, and shows the speedup at assumed
acceptances. --output then gets rows.jsonl and rows.png.
"""

from dataclasses import dataclass

from lsjax.cli.flags.evaluate import TaskFlags, TaskName
from lsjax.cli.flags.parse import Program
from lsjax.cli.flags.shared import StrategyFlags, StrategyName
from lsjax.config import AnyPath, bounded


@dataclass(frozen=True, kw_only=True)
class Arguments(TaskFlags, StrategyFlags):
    """Compares strategies on the same prompts."""

    strategies: tuple[StrategyName, ...] = ("self_speculative",)
    """Strategies to compare with autoregressive decoding, at every exit."""
    prompt: str | None = None
    """Text to continue; by default, three built-in prompts."""
    prompt_file: AnyPath | None = None
    """File of prompts. A .txt file is one prompt. A .jsonl file has "prompt" (or Spec-Bench's
    "turns") on each line. With --prompt-template, other rows, .tsv and .csv work too; also .gz."""
    task: TaskName | None = None
    """Prompts of a task (docs/evaluation.md)."""
    new_tokens: int = bounded(64, low=2)
    """New tokens per prompt; end-of-text tokens are ignored."""
    repeats: int = bounded(5, low=1)
    """Number of runs of each strategy with each prompt."""
    rows: tuple[int, ...] = bounded((), low=1)
    """Times rounds of these numbers of rows instead of texts, such as 1 8 32 64."""
    identity_tail: int | None = None
    """Layers from this one on add nothing. Drafts of this or a later exit are all accepted.
    The draft vocabulary is chosen from the model's own output."""
    output: AnyPath | None = None
    """Directory for answers, table and plot; by default, nothing is written."""


PROGRAM = Program(
    "benchmark",
    "lsjax.cli.benchmark:benchmark",
    Arguments,
    __doc__,
    common="""
        model exit_layers num_draft_tokens strategies prompt prompt_file task new_tokens
        repeats rows identity_tail draft_vocab batch_size output
    """,
    usage="--model PATH",
)
