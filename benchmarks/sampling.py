"""What sampling and penalties cost over greedy decoding.

    python benchmarks/sampling.py models/smollm2

Rounds of each strategy with each way of choosing tokens, as loops on the device that repeat one
round at one place, all in turns; the ratio is to the greedy rounds of the same strategy.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.decoding.calibration import median_seconds, rounds_loop
from lsjax.decoding.sampling import GREEDY, Sampling

WAYS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=0.8),
    "+ top-k 50": Sampling(temperature=0.8, top_k=50),
    "+ top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
    "+ min-p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "+ all three": Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.05),
    "greedy, repetition 1.1, 3-grams": Sampling(repetition_penalty=1.1, no_repeat_ngram=3),
}


@dataclass(frozen=True)
class Arguments:
    """What sampling costs over greedy decoding."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory or .gguf file."""
    exit_layer: int = 8
    """Of the drafts."""
    num_draft_tokens: int = 8
    """Drafts in a round."""


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    keep_compiled_programs()
    exact_products()
    model = lsjax.load(arguments.model)
    drafting = lsjax.SelfSpeculative(arguments.exit_layer, arguments.num_draft_tokens)
    table = Table("", "autoregressive ms", "over greedy", "self-speculative ms", "over greedy")
    columns = [
        median_seconds([rounds_loop(model, strategy, sampling=way) for way in WAYS.values()])
        for strategy in (lsjax.Autoregressive(), drafting)
    ]
    for name, *seconds in zip(WAYS, *columns, strict=True):
        cells = []
        for second, column in zip(seconds, columns, strict=True):
            cells += [f"{second * 1e3:.2f}", f"{second / column[0]:.3f}"]
        table.add_row(name, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Vocabulary {model.config.vocab_size}, exit {drafting.exit_layer}, "
        f"{drafting.num_draft_tokens} drafts, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
