"""Checks that self-speculation gives the tokens of autoregressive decoding on real prompts.

    python -m lsjax.cli.correctness --model PATH --prompt-file question.jsonl --every 15 \\
        --exit-layers 8 15 23 --num-draft-tokens 2 4 8
    python -m lsjax.cli.correctness --model PATH --dtype bfloat16 --prompt-file gsm8k/test.jsonl \\
        --prompt-template '{question}' --limit 100 --exit-layers 8 --num-draft-tokens 4

Exit code 1 if tokens differ in float32 where the two best logits lie further apart than rounding
explains. Where texts differ, the margins of the first differing tokens are shown.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import assemble, open_checkpoint
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.prompts import PromptArguments, read_encoded
from lsjax.cli.setup import cache_directory, exact_products, keep_compiled_programs
from lsjax.cli.strategies import in_one_program
from lsjax.config import check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.exactness import FLOAT32_MARGIN, Difference, first_difference

HEADER = ("exit", "drafts", "equal", "differ", "widest margin", "acceptance", "tokens/round")
ROW = "{:>4}  {:>6}  {:>5}  {:>6}  {:>13}  {:>10}  {:>12}"
SHOWN = 10  # differing texts
PROMPT = "Once upon a time, there was a little girl named Lily who"


@dataclass(frozen=True, kw_only=True)
class Arguments(PromptArguments):
    """Checks that self-speculation gives the tokens of autoregressive decoding."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run."""
    exit_layers: tuple[int, ...]
    """Exits to draft from."""
    num_draft_tokens: tuple[int, ...]
    """Draft lengths; every exit is tried with every length."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only (lsjax.cli.count_tokens)."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability."""
    max_new_tokens: int = 64
    """Tokens to compare."""
    batch_size: int = 1
    """Prompts side by side in the self-speculative runs; the autoregressive ones go alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In the 16-bit types differences are counted and shown, and are no failure."""
    json: Path | None = None
    """Writes a JSON object a cell to this file, with every text that differs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 if all agree, 1 if not, 2 on bad input."""
    with one_line_errors():
        return correctness(parse_flags(Arguments, argv, __doc__))


def correctness(arguments: Arguments) -> int:
    """Compares and prints a row for every exit and draft length."""
    check(bool(arguments.exit_layers), "--exit-layers is empty: name exits to draft from")
    check(bool(arguments.num_draft_tokens), "--num-draft-tokens is empty: name draft lengths")
    source = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(arguments.model).fitted(source.config.vocab_size)
    vocabulary = None
    if arguments.draft_vocab is not None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
        size = arguments.draft_vocab
        vocabulary = DraftVocabulary.most_frequent(counts, size, source.config.vocab_size)
    cell = partial(
        SelfSpeculative, vocabulary=vocabulary, draft_confidence=arguments.draft_confidence
    )
    strategies = in_one_program(
        [
            cell(exit_layer, drafts)
            for exit_layer in sorted({*arguments.exit_layers})
            for drafts in sorted({*arguments.num_draft_tokens})
        ]
    )
    for strategy in strategies:
        check_settings(
            source.config,
            strategy,
            batch_size=arguments.batch_size,
            max_length=None,
        )
    limits = dict(max_new_tokens=arguments.max_new_tokens, max_length=None)
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    prompts = read_encoded(
        arguments,
        [PROMPT],
        lambda prompt: encode_prompt(prompt, tokenizer, source.config, **limits),
        notes.print,
    )
    if arguments.json is not None:
        check_output(arguments.json, arguments.prompt_file)
    keep_compiled_programs()
    exact_products()
    model = assemble(source, dtype=arguments.dtype)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{arguments.model.name}, {arguments.dtype}, {len(prompts)} prompts, "
        f"{arguments.max_new_tokens} new tokens\n" + ROW.format(*HEADER)
    )
    cells = []
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("decoding", total=len(prompts) * (1 + len(strategies)))

        def run(engine: Engine) -> list[Completion]:
            return engine.generate(
                prompts,
                max_new_tokens=arguments.max_new_tokens,
                on_completion=lambda *_: progress.advance(task),
            )

        expected = run(Engine(model, tokenizer))
        engine = Engine(model, tokenizer, strategies[0], batch_size=arguments.batch_size)
        for strategy in strategies:
            engine.use(strategy)
            found = run(engine)
            texts = zip(prompts, expected, found, strict=True)
            cell = Cell(
                strategy.exit_layer,
                strategy.num_draft_tokens,
                {
                    number: difference
                    for number, (ids, one, other) in enumerate(texts, start=1)
                    if (difference := first_difference(model, ids, one.token_ids, other.token_ids))
                },
            )
            console.print(cell.line(found))
            cells.append(cell)
    show_differences(console, cells, tokenizer, arguments.dtype)
    if arguments.json is not None:
        with arguments.json.open("w", encoding="utf-8") as lines:
            for cell in cells:
                print(json.dumps(cell.to_json()), file=lines)
    if arguments.dtype != "float32":
        return 0
    margins = [one.margin for cell in cells for one in cell.differences.values()]
    wrong = sum(not margin <= FLOAT32_MARGIN for margin in margins)
    if wrong:
        console.print(f"[bold red]{wrong} differences are wider than {FLOAT32_MARGIN:.0e}")
        return 1
    console.print("[green]Self-speculation gives the tokens of autoregressive decoding.")
    return 0


@dataclass(frozen=True)
class Cell:
    """One exit and draft length; the texts that differ, by the number of the prompt."""

    exit_layer: int
    num_draft_tokens: int
    differences: dict[int, Difference]

    def to_json(self) -> dict[str, Any]:
        """Its fields; a margin that is no finite number is null."""
        row = asdict(self)
        for one in row["differences"].values():
            one |= {k: None for k, v in one.items() if isinstance(v, float) and not isfinite(v)}
        return row

    def line(self, found: Sequence[Completion]) -> str:
        """Its row of the table."""
        margins = [one.margin for one in self.differences.values()]
        drafted = sum(one.drafted for one in found)
        rounds = sum(one.rounds for one in found)
        return ROW.format(
            self.exit_layer,
            self.num_draft_tokens,
            len(found) - len(margins),
            len(margins),
            f"{max(margins):.1e}" if margins else "-",
            f"{sum(one.accepted for one in found) / drafted:.3f}" if drafted else "-",
            f"{sum(one.num_new_tokens - 1 for one in found) / rounds:.2f}" if rounds else "-",
        )


def show_differences(
    console: Console, cells: Sequence[Cell], tokenizer: Tokenizer, dtype: str
) -> None:
    """The differing tokens with the widest margins, and where they are."""
    everything = [
        (one, f"prompt {number}, exit {cell.exit_layer}, {cell.num_draft_tokens} drafts")
        for cell in cells
        for number, one in cell.differences.items()
    ]
    everything.sort(key=lambda pair: -pair[0].margin)
    if everything:
        console.print(f"{len(everything)} texts differ; the widest margins:")
    for one, where in everything[:SHOWN]:
        tokens = " became ".join(
            "the end" if token is None else repr(tokenizer.decode([token]))
            for token in (one.expected, one.found)
        )
        margin = f"margin {one.margin:.1e}, {one.roundings:.2g} roundings of {dtype}"
        console.print(f"  {where}: new token {1 + one.index}, {tokens}, {margin}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
