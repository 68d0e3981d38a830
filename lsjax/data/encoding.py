"""Ids of documents: with or without a prompt, in batches, and of any length."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from lsjax.config import DataConfig, check
from lsjax.data.pieces import Document
from lsjax.data.tokenizer import Tokenizer, TokenizerError

# Characters that are encoded at a time, which take about 40 bytes each.
BATCH = 1_000_000
# SentencePiece rarely joins these with the next character. Its normalizers drop the first.
MARKS = ("\x01", ".", ":", "0", "\u4e00")


def encode_documents(
    documents: Sequence[Document], config: DataConfig, tokenizer: Tokenizer
) -> list[tuple[list[int], int]]:
    """Token ids of documents, and the number of prompt tokens of each.

    A prompt is encoded separately, as in decoding, and includes a beginning-of-text token.
    """
    if any(document.ids for document in documents):
        for document in documents:
            extra = max(document.ids, key=lambda token: token if token >= 0 else float("inf"))
            check(
                0 <= extra < tokenizer.vocab_size,
                f"token {extra} of a record is not one of {tokenizer.vocab_size}: name the "
                "tokenizer that made the records",
            )
        return [(list(document.ids), 0) for document in documents]
    special, end = config.allow_special, [*tokenizer.eos_ids[:1]] * config.append_end
    texts = [document.text for document in documents]
    if not config.has_prompts:
        found = tokenizer.encode_batch(texts, allow_special=special)
        return [(ids + end, 0) for ids in found]
    prompts = [document.prompt for document in documents]
    heads = tokenizer.encode_batch(prompts, allow_special=special)
    tails = _continuations(texts, tokenizer, special)
    return [(head + tail + end, len(head)) for head, tail in zip(heads, tails, strict=True)]


def encode_long(
    document: Document, config: DataConfig, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
    """The same for one document of any length, in parts of BATCH characters that end with lines."""
    rest = _parts(document.text)
    start, settings = replace(document, text=next(rest)), replace(config, append_end=False)
    ((head, count),) = encode_documents([start], settings, tokenizer)
    parts = (_continuations([part], tokenizer, config.allow_special)[0] for part in rest)
    end = [*tokenizer.eos_ids[:1]] * config.append_end
    # Arrays at once: lists of ids take 40 bytes a token.
    ids = [np.array(part, np.uint32) for part in chain([head], parts, [end])]
    return np.concatenate(ids), count


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most BATCH characters, at line ends where there are any."""
    begin = 0
    while len(text) - begin > BATCH:
        end = text.rfind("\n", begin, begin + BATCH) + 1 or begin + BATCH
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _continuations(texts: Sequence[str], tokenizer: Tokenizer, special: bool) -> list[list[int]]:
    """Ids of continuations, without the space that SentencePiece puts before a text."""
    if not texts or not tokenizer.leading_spaces:
        return tokenizer.encode_batch(texts, add_bos=False, allow_special=special)
    for mark in MARKS:
        alone = tokenizer.encode(mark, add_bos=False)
        marked = [mark + text for text in texts]
        batch = tokenizer.encode_batch(marked, add_bos=False, allow_special=special)
        split = all(ids[: len(alone)] == alone for ids in batch)
        if tokenizer.decode(alone) == mark and split:
            return [ids[len(alone) :] for ids in batch]
    raise TokenizerError(f"the tokenizer joins {texts[0][:40]!r} with its prompt: use another one")
