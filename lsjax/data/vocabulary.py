"""The tokenizer that a configuration names, vocabularies trained here, and token counts.

The counts select a draft vocabulary. They are in the model's directory, or in the cache:
{"tokenizer": fingerprint, "total": n, "counts": {"id": n, ...}}.
"""

import contextlib
import hashlib
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
import sentencepiece
from jaxtyping import Int32

from lsjax.config import AnyPath, ConfigError, DataConfig, as_path, check, split_step
from lsjax.data.pieces import Document, is_held_out
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_backends import ByteTokenizer, SentencePieceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.io.files import one_line, write_whole

COUNTS = "token_counts.json"  # in a model's directory
WRITTEN = "-written"
ENOUGH = 10_000  # decoded tokens, before a draft vocabulary is chosen by their counts
SAMPLE = 20_000_000  # maximum number of characters to train a vocabulary on
SETTINGS = dict(
    model_type="bpe",
    byte_fallback=True,  # decoding restores any text
    split_digits=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,  # indentation
    max_sentence_length=1 << 20,
    num_threads=1,  # the same vocabulary each time
)


def make_tokenizer(config: DataConfig, *, cache: AnyPath) -> Tokenizer:
    """The tokenizer of config.tokenizer; training one reads only the training documents.

    Raises ConfigError (no data, or too little text for the vocabulary), TokenizerError (a path).
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "sentencepiece":
        return load_tokenizer(as_path(config.tokenizer).expanduser())
    source, fraction = document_source(config), config.held_out_fraction
    # Found by the files' names, sizes and times, so that a later start reads none of them.
    known = [sentencepiece.__version__, SETTINGS, repr(config), source.stats()]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    file = cache / "vocabularies" / f"of-{name}.model"
    if not file.is_file():
        training = (one for one in source.documents() if not is_held_out(one.key, fraction))
        write_whole(file, train_tokenizer(training, config.vocab_size).model)
    return SentencePieceTokenizer(file.read_bytes())


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a SentencePiece BPE of vocab_size: <unk> 0, <s> 1, </s> 2, 256 bytes, then pieces.

    Decoding restores the text exactly. Equal documents in any order give an equal vocabulary.
    If there are more than SAMPLE characters, it reads a random part.

    Raises ConfigError if there is too little text, or too many different characters.
    """
    texts = _sample(documents)
    check(bool(texts), "there are no documents to train a vocabulary on: check the source")
    model, lines = io.BytesIO(), (line for text in texts for line in text.split("\n") if line)
    options = dict(sentence_iterator=lines, model_writer=model, minloglevel=2)
    try:
        sentencepiece.SentencePieceTrainer.train(vocab_size=vocab_size, **options, **SETTINGS)
    except RuntimeError as error:
        characters = sum(map(len, texts))
        raise ConfigError(
            f"SentencePiece cannot train a vocabulary of {vocab_size} on {characters} characters "
            f"of text ({one_line(error)}): set another data.vocab_size, or data.tokenizer bytes"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _sample(documents: Iterable[Document]) -> list[str]:
    """Texts with the smallest hashes, in that order: up to SAMPLE characters, or one text."""
    kept: list[tuple[int, str]] = []  # a heap, the largest hash on top
    total, bound = 0, 1 << 64
    for document in documents:
        if document.key >= bound:
            continue
        text = document.prompt + document.text
        heapq.heappush(kept, (-document.key, text))
        total += len(text)
        while total > SAMPLE and len(kept) > 1:
            key, text = heapq.heappop(kept)
            total, bound = total - len(text), -key
    return [text for _, text in sorted(kept, reverse=True)]


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
