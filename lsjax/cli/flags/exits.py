"""Scores every exit of models on the held-out data of the first, a training run.

    lsjax exits --runs runs/quickstart runs/plain --output exits.png
    lsjax exits --runs runs/smollm2 models/smollm2 --output exits.png

The second command compares a run with the model that it started from. The table has loss,
perplexity and agreement by exit. The plot has a line per model (the paper's Figures 6 and 8).
"""

from dataclasses import dataclass

from lsjax.cli.flags.parse import Program
from lsjax.config import AnyPath, Checked, bounded


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked, prefix="--"):
    """Scores every exit of training runs and models."""

    runs: tuple[AnyPath, ...]
    """A training run, then runs or models with the same tokenizer to compare with it."""
    batches: int = bounded(64, low=1)
    """Number of held-out batches, of the first run's batch size."""
    output: AnyPath | None = None
    """Plot to draw (.png)."""
    json: AnyPath | None = None
    """Writes one JSON object per run to this file."""


PROGRAM = Program(
    "exits",
    "lsjax.cli.exits:score_models",
    Arguments,
    __doc__,
    common="""
        runs batches output json
    """,
    usage="--runs PATH ...",
)
