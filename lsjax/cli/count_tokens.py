"""Counts the tokens of a text, so that self-speculation can draft from the most frequent ones.

    python -m lsjax.cli.count_tokens --model PATH --text domain.txt more.jsonl
    python decode.py --model PATH --strategy self_speculative ... --draft-vocab 2048

The counts are stored in the cache for all models with this tokenizer, or in the --output file.
"""

from lsjax.interrupts import run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.count_tokens")

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import jax
from rich.progress import Progress

from lsjax.checkpoints import find_step
from lsjax.cli.setup import program
from lsjax.cli.show import notes_console
from lsjax.config import AnyPath, Checked
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.vocabulary import cached_counts, count_tokens, write_counts
from lsjax.io.files import cache_directory
from lsjax.io.rows import json_rows, read_lines
from lsjax.terminal import SafeConsole

LINES = 1 << 14  # lines of text encoded at a time


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked, prefix="--"):
    """Counts the tokens of a text."""

    model: AnyPath
    """Hugging Face directory, .gguf file, or directory of a training run, for its tokenizer."""
    text: tuple[AnyPath, ...]
    """Text files. In .jsonl files, every string in the objects counts."""
    output: AnyPath | None = None
    """File to write. decode.py finds token_counts.json in a model's directory."""


def count(arguments: Arguments) -> None:
    """Counts the tokens and writes the counts."""
    model, _ = find_step(arguments.model)
    tokenizer = load_tokenizer(model)
    output = arguments.output or cached_counts(cache_directory(), tokenizer)
    counts, total = Counter(), sum(file.stat().st_size for file in arguments.text)
    notes = notes_console()
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("counting", total=total)
        for piece in chain.from_iterable(map(read_pieces, arguments.text)):
            counts.update(count_tokens(tokenizer, [piece]))
            progress.advance(task, len(piece.encode()))
    write_counts(output, tokenizer, counts)
    found = f"{counts.total()} tokens, {len(counts)} distinct"
    SafeConsole(soft_wrap=True).print(f"{output}: {found}")


def read_pieces(file: AnyPath) -> Iterator[str]:
    """A file's text in pieces: each string of a .jsonl file, or LINES lines of another file. Raises
    ConfigError with the line for text that is not UTF-8, or for a JSON line without object."""
    if file.suffix == ".jsonl":
        for _, row in json_rows(file):
            texts = (leaf for leaf in jax.tree.leaves(row) if isinstance(leaf, str))
            # JSON may hold half a surrogate pair.
            yield from (text.encode(errors="replace").decode() for text in texts)
        return
    lines = (line for *_, line in read_lines(file))
    while piece := "".join(islice(lines, LINES)):
        yield piece


main = program(Arguments, count, __doc__)
