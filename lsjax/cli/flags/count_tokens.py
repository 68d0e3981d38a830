"""Counts the tokens of a text, to draft from the most frequent ones.

    lsjax count-tokens --model PATH --text domain.txt more.jsonl
    python decode.py --model PATH --strategy self_speculative ... --draft-vocab 2048

The counts are stored in the cache for all models with this tokenizer, or in the --output file.
"""

from dataclasses import dataclass

from lsjax.cli.flags.parse import Program
from lsjax.config import AnyPath, Checked


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked, prefix="--"):
    """Counts the tokens of a text."""

    model: AnyPath
    """Hugging Face directory, .gguf file, or directory of a training run, for its tokenizer."""
    text: tuple[AnyPath, ...]
    """Text files. In .jsonl files, every string in the objects counts."""
    output: AnyPath | None = None
    """File to write. decode.py finds token_counts.json in a model's directory."""


PROGRAM = Program(
    "count-tokens",
    "lsjax.cli.count_tokens:count",
    Arguments,
    __doc__,
    common="""
        model text output
    """,
    usage="--model PATH --text FILE ...",
)
