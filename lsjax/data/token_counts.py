"""How often each token occurs in a domain: what a draft vocabulary is chosen by.

A JSON file `token_counts.json` in the model's directory, or one in the cache under the
tokenizer's fingerprint: {"tokenizer": fingerprint, "total": n, "counts": {"id": n, ...}}.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lsjax.config import ConfigError, check, split_step
from lsjax.data.tokenizers import Tokenizer
from lsjax.data.whole_files import write_whole

NAME = "token_counts.json"


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Occurrences of each token id in the texts, special tokens left out."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, add_bos=False, allow_special=False))
    return counts


def cached_counts(cache: Path, tokenizer: Tokenizer) -> Path:
    """Where the counts of a tokenizer lie in the cache directory."""
    return cache / "token_counts" / f"{tokenizer.fingerprint[:16]}.json"


def write_counts(file: Path, tokenizer: Tokenizer, counts: Counter[int]) -> None:
    """Writes the file, whole or not at all.

    Raises ConfigError where nothing was counted, OSError where it can't be written.
    """
    check(bool(counts), "the text has no tokens in it: count a longer one")
    content = {
        "tokenizer": tokenizer.fingerprint,
        "total": counts.total(),
        "counts": {str(token): n for token, n in counts.most_common()},
    }
    write_whole(file, json.dumps(content).encode())


def read_counts(file: Path, tokenizer: Tokenizer) -> Counter[int]:
    """The counts in a file.

    Raises ConfigError for a file that is not one of these, or of another tokenizer.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        counts = Counter({int(token): int(n) for token, n in content["counts"].items()})
        fingerprint = content["tokenizer"]
    except (
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise ConfigError(f"{file} has no token counts in it ({error}): count again") from None
    check(
        fingerprint == tokenizer.fingerprint,
        f"{file} was counted with another tokenizer: count again with the model's own",
    )
    good = all(0 <= token < tokenizer.vocab_size and n >= 0 for token, n in counts.items())
    check(bool(counts) and good, f"{file} counts tokens that there are not: count again")
    return counts


def find_counts(model: Path, cache: Path, tokenizer: Tokenizer) -> Counter[int]:
    """The counts of the model's directory, else those in the cache.

    Raises ConfigError, with the command that makes them, where there are none.
    """
    model, _ = split_step(model)
    candidates = [model / NAME] if model.is_dir() else []
    for file in (*candidates, cached_counts(cache, tokenizer)):
        if file.is_file():
            return read_counts(file, tokenizer)
    raise ConfigError(
        "a draft vocabulary needs token counts, and there are none for this tokenizer: make them "
        f"by python -m lsjax.cli.count_tokens --model {model} --text FILE, with text of your "
        "domain"
    )
