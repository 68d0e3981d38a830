"""Counts of a tokenizer's tokens, which select a draft vocabulary.

They are in the model's directory, or in the cache:
{"tokenizer": fingerprint, "total": n, "counts": {"id": n, ...}}.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
from jaxtyping import Int32

from lsjax.config import AnyPath, ConfigError, check, split_step
from lsjax.data.tokenizer import Tokenizer
from lsjax.io.files import write_whole

COUNTS = "token_counts.json"  # in a model's directory
WRITTEN = "-written"
ENOUGH = 10_000  # decoded tokens, before a draft vocabulary is chosen by their counts


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Occurrences of each token id in the texts, without special tokens."""
    batch = (tokenizer.encode(text, add_bos=False, allow_special=False) for text in texts)
    return Counter(chain.from_iterable(batch))


def cached_counts(cache: AnyPath, tokenizer: Tokenizer, kind: str = "") -> AnyPath:
    """File of a tokenizer's counts in the cache: of a text, or of decoded tokens (WRITTEN)."""
    return cache / "token_counts" / f"{tokenizer.fingerprint[:16]}{kind}.json"


def add_written(cache: AnyPath, tokenizer: Tokenizer, ids: Iterable[int]) -> None:
    """Adds decoded tokens to the counts in the cache. A damaged file is replaced."""
    file, counts = cached_counts(cache, tokenizer, WRITTEN), Counter(ids)
    with contextlib.suppress(ConfigError):
        counts += read_counts(file, tokenizer)
    if counts:
        write_counts(file, tokenizer, counts)


def write_counts(file: AnyPath, tokenizer: Tokenizer, counts: Counter[int]) -> None:
    """Writes the file atomically. Raises ConfigError if nothing was counted."""
    check(bool(counts), "the text has no tokens: count a longer one")
    content = {"tokenizer": tokenizer.fingerprint, "total": counts.total()}
    content["counts"] = dict(counts.most_common())
    write_whole(file, json.dumps(content).encode())


def read_counts(file: AnyPath, tokenizer: Tokenizer) -> Counter[int]:
    """Counts from a file. Raises ConfigError if it has none, or another tokenizer's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        counts = Counter({int(token): int(n) for token, n in content["counts"].items()})
        fingerprint = content["tokenizer"]
    except Exception as error:  # the file may hold anything
        raise ConfigError(f"{file} has no token counts ({error}): count again") from None
    same = fingerprint == tokenizer.fingerprint
    check(same, f"{file} was counted with another tokenizer: count again with the model's own")
    good = all(0 <= token < tokenizer.vocab_size and n >= 0 for token, n in counts.items())
    check(bool(counts) and good, f"{file} has empty or invalid counts: count again")
    return counts


def most_frequent(counts: Mapping[int, int], size: int) -> Int32[np.ndarray, " W"]:
    """The `size` ids with the highest counts, then the lowest ids, which tokenizers give to their
    first merges. In ascending order."""
    known = sorted({*range(size), *counts}, key=lambda token: (-counts.get(token, 0), token))
    return np.sort(np.array(known[:size], np.int32))


def find_counts(model: AnyPath, cache: AnyPath, tokenizer: Tokenizer) -> Counter[int]:
    """Counts from the model's directory, else from the cache: of a text, or of ENOUGH decoded
    tokens. Raises ConfigError."""
    model, _ = split_step(model)
    written = cached_counts(cache, tokenizer, WRITTEN)
    for file in (model / COUNTS, cached_counts(cache, tokenizer), written):
        if file.is_file():
            counts = read_counts(file, tokenizer)
            if file != written or counts.total() >= ENOUGH:
                return counts
    raise ConfigError(
        "a draft vocabulary needs token counts, and this tokenizer's are missing: make them "
        f"with lsjax count-tokens --model {model} --text FILE, of your domain"
    )
