"""Runs tasks of lm-evaluation-harness at exits and with strategies.

    pip install 'lsjax[eval]'
    lsjax lm-eval --model PATH --tasks gsm8k hellaswag --limit 100 \\
        --strategies autoregressive early_exit --exit-layers 8 15
    lsjax lm-eval --model PATH --tasks mine --task-path DIRECTORY \\
        --strategies self_speculative --exit-layers 8 --num-draft-tokens 4 --output results

docs/evaluation.md explains the figures.
"""

from dataclasses import dataclass

from lsjax.cli.flags.parse import Program
from lsjax.cli.flags.shared import ChatFlags, ModelFlags, StrategyFlags
from lsjax.config import AnyPath, bounded


@dataclass(frozen=True, kw_only=True)
class Arguments(StrategyFlags, ChatFlags, ModelFlags):
    """Tasks of lm-evaluation-harness at several exits and with several strategies."""

    tasks: tuple[str, ...]
    """Names or patterns of tasks, groups and tags."""
    task_path: AnyPath | None = None
    """Directory of .yaml task files, instead of lm_eval's own tasks."""
    num_fewshot: int | None = None
    """Examples before each question; the task's own number by default."""
    limit: float | None = bounded(None, above=0)
    """Number of documents per task, or a share of them if below 1."""
    gen_kwargs: str | None = None
    """Overrides generation settings of tasks: "max_gen_toks=64,do_sample=True,temperature=0.8"."""
    seed: int = bounded(0, low=0, high=2**32 - 1)
    """Seed of the first sampled text. Each further text has the next seed."""
    output: AnyPath | None = None
    """Directory for lm_eval's results and samples, with a folder per strategy."""


PROGRAM = Program(
    "lm-eval",
    "lsjax.cli.lm_eval:run_tasks",
    Arguments,
    __doc__,
    common="""
        model tasks task_path strategies exit_layers num_draft_tokens limit num_fewshot
        batch_size output
    """,
    usage="--model PATH --tasks NAME ...",
)
