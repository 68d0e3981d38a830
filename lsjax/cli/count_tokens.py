"""Counts the tokens of a text, so that self-speculation can draft from the most frequent ones.

    python -m lsjax.cli.count_tokens --model PATH --text domain.txt more.jsonl
    python decode.py --model PATH --strategy self_speculative ... --draft-vocab 2048

The counts are kept in the cache for every model with this tokenizer, or where --output says.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lsjax.cli.errors import one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.setup import cache_directory
from lsjax.config import ConfigError
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.vocabulary import cached_counts, count_tokens, write_counts

PIECE = 1 << 20  # characters that are encoded at a time
SHARES = (1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Counts the tokens of a text."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run, for its tokenizer."""
    text: tuple[Path, ...]
    """Files of text; of .jsonl files, every text in the objects of the lines."""
    output: Path | None = None
    """File to write; token_counts.json in a model's directory is found by decode.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        count(parse_flags(Arguments, argv, __doc__))
    return 0


def count(arguments: Arguments) -> None:
    """Counts, writes and says what share of the text the most frequent tokens make."""
    tokenizer = load_tokenizer(arguments.model)
    output = arguments.output or cached_counts(cache_directory(), tokenizer)
    total = sum(file.stat().st_size for file in arguments.text)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("counting", total=total)

        def pieces() -> Iterator[str]:
            for file in arguments.text:
                for piece in read_pieces(file):
                    yield piece
                    progress.advance(task, len(piece.encode()))

        counts = count_tokens(tokenizer, pieces())
    write_counts(output, tokenizer, counts)
    print(f"{output}: {counts.total()} tokens, {len(counts)} different ones")
    ranked = [n for _, n in counts.most_common()]
    for size in (size for size in SHARES if size < len(ranked)):
        print(f"the {size} most frequent make {sum(ranked[:size]) / counts.total():.1%}")


def read_pieces(file: Path) -> Iterator[str]:
    """A file's text in pieces: of .jsonl every string by itself, of others PIECE characters and
    what is left of the line.

    Raises ConfigError with the line for what is not UTF-8, or not JSON in a .jsonl file.
    """
    rows = file.suffix == ".jsonl"
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        line, held = 0, ""
        while True:
            line += 1
            try:
                text = lines.readline()
                strings = list(_strings(json.loads(text))) if rows and text.strip() else []
                "".join(strings).encode()  # JSON may hold half a character
            except UnicodeError:
                raise ConfigError(
                    f"{file}, near line {line}, is not UTF-8 text: save it as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", error)
                raise ConfigError(f"{file}, line {line} is not JSON ({problem})") from None
            yield from strings
            if not rows:
                held += text
            if held and (len(held) >= PIECE or not text):
                yield held
                held = ""
            if not text:
                return


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys left out."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _strings(item)
        case dict():
            yield from _strings(list(value.values()))


if __name__ == "__main__":
    sys.exit(main())
