"""Checks that self-speculation gives the tokens of autoregressive decoding on real prompts.

    python -m lsjax.cli.correctness --model PATH --prompt-file question.jsonl --every 15 \\
        --exit-layers 8 15 23 --num-draft-tokens 2 4 8

Exit code 1 if tokens differ where the two best logits lie further apart than rounding explains.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from lsjax.cli.errors import one_line_errors
from lsjax.cli.prompts import encode_prompts, read_prompts
from lsjax.cli.setup import cache_directory, exact_products, keep_compiled_programs
from lsjax.config import check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.self_speculative import Choices, SelfSpeculative
from lsjax.evaluation.exactness import FLOAT32_MARGIN, first_difference
from lsjax.model.checkpoint import assemble, open_source

HEADER = ("exit", "drafts", "equal", "differ", "widest margin", "acceptance", "tokens/round")
ROW = "{:>4}  {:>6}  {:>5}  {:>6}  {:>13}  {:>10}  {:>12}"
PROMPT = "Once upon a time, there was a little girl named Lily who"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Checks that self-speculation gives the tokens of autoregressive decoding."""

    model: Path
    """Hugging Face directory or .gguf file."""
    exit_layers: tuple[int, ...]
    """Exits to draft from."""
    num_draft_tokens: tuple[int, ...]
    """Draft lengths; every exit is tried with every length."""
    prompt_file: Path | None = None
    """.txt or .jsonl ("prompt", or Spec-Bench's "turns"); one prompt is built in."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only (lsjax.cli.count_tokens)."""
    every: int = 1
    """Takes every n-th prompt of the file."""
    max_new_tokens: int = 64
    """Tokens to compare."""
    batch_size: int = 1
    """Prompts side by side in the self-speculative runs; the autoregressive ones go alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In the 16-bit types differences are counted and shown, and are no failure."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 if all agree, 1 if not, 2 on bad input."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    with one_line_errors():
        return correctness(arguments)


def correctness(arguments: Arguments) -> int:
    """Compares and prints a row for every exit and draft length."""
    check(arguments.every >= 1, f"--every {arguments.every} is below 1: choose 1 or more")
    prompts = read_prompts(None if arguments.prompt_file else PROMPT, arguments.prompt_file)
    prompts = prompts[:: arguments.every]
    source = open_source(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    vocabulary = None
    if arguments.draft_vocab is not None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
        vocabulary = DraftVocabulary.most_frequent(counts, arguments.draft_vocab)
    exits, lengths = sorted({*arguments.exit_layers}), sorted({*arguments.num_draft_tokens})
    choices = Choices(tuple(exits), tuple(lengths))
    strategies = [
        SelfSpeculative(exit_layer, drafts, vocabulary, choices)
        for exit_layer in exits
        for drafts in lengths
    ]
    for strategy in strategies:
        check_settings(
            source.config,
            tokenizer,
            strategy,
            batch_size=arguments.batch_size,
            max_length=None,
        )
    limits = dict(max_new_tokens=arguments.max_new_tokens, max_length=None)
    encoded = encode_prompts(
        prompts, lambda prompt: encode_prompt(prompt, tokenizer, source.config, **limits)
    )
    keep_compiled_programs()
    exact_products()
    model = assemble(source, dtype=arguments.dtype)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{arguments.model.name}, {arguments.dtype}, {len(prompts)} prompts, "
        f"{arguments.max_new_tokens} new tokens\n" + ROW.format(*HEADER)
    )
    wrong = 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("decoding", total=len(prompts) * (1 + len(strategies)))

        def run(engine: Engine) -> list[Completion]:
            return engine.generate(
                encoded,
                max_new_tokens=arguments.max_new_tokens,
                on_completion=lambda *_: progress.advance(task),
            )

        expected = run(Engine(model, tokenizer))
        engine = Engine(model, tokenizer, strategies[0], batch_size=arguments.batch_size)
        for strategy in strategies:
            engine.use(strategy)
            found = run(engine)
            differences = [
                first_difference(model, ids, one.token_ids, other.token_ids)
                for ids, one, other in zip(encoded, expected, found, strict=True)
            ]
            margins = [d.margin for d in differences if d is not None]
            if arguments.dtype == "float32":
                wrong += sum(not margin <= FLOAT32_MARGIN for margin in margins)
            drafted = sum(c.drafted for c in found)
            rounds = sum(c.rounds for c in found)
            console.print(
                ROW.format(
                    strategy.exit_layer,
                    strategy.num_draft_tokens,
                    len(prompts) - len(margins),
                    len(margins),
                    f"{max(margins):.1e}" if margins else "-",
                    f"{sum(c.accepted for c in found) / drafted:.3f}" if drafted else "-",
                    f"{sum(c.num_new_tokens - 1 for c in found) / rounds:.2f}" if rounds else "-",
                )
            )
    if wrong:
        console.print(f"[bold red]{wrong} differences are wider than {FLOAT32_MARGIN:.0e}")
    elif arguments.dtype == "float32":
        console.print("[green]Self-speculation gives the tokens of autoregressive decoding.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
