"""Counts the tokens of a text, so that self-speculation can draft from the most frequent ones."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice

import jax
from rich.progress import Progress

from lsjax.checkpoints import find_step
from lsjax.cli.flags.count_tokens import Arguments
from lsjax.cli.notes import notes_console
from lsjax.config import AnyPath
from lsjax.data.token_counts import cached_counts, count_tokens, write_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.io.files import cache_directory
from lsjax.io.rows import json_rows, read_lines
from lsjax.terminal import SafeConsole

LINES = 1 << 14  # lines of text encoded at a time


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
