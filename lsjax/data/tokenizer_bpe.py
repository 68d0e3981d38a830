"""Building BPE pipelines of the `tokenizers` library from vocabularies in other formats."""

from __future__ import annotations

import re
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of a byte
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_words() -> pre_tokenizers.PreTokenizer:
    """Llama 3's split of a text into words, spelled as bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    whole_words: bool = False,
) -> tokenizers.Tokenizer:
    """A BPE over bytes; with `whole_words` a word that is a token is taken without merging."""
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def all_merges(order: Iterable[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token from two tokens, by priority of the result.

    Rank BPE (tiktoken, SentencePiece) joins any two neighbours whose union is a token; a list of
    merges says the same only if it holds all pairs.
    """
    merges = []
    for token in order:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def byte_characters() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def added_token(token: str, *, special: bool = True) -> AddedToken:
    """A token that is read wherever its spelling stands in a text."""
    return AddedToken(token, special=special, normalized=False)


def set_bos(backend: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Has other readers of the pipeline put `bos_id` first, or nothing."""
    bos = [] if bos_id is None else [(backend.id_to_token(bos_id), bos_id)]
    names = [name for name, _ in bos]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", *names, "$B:1"], special_tokens=bos
    )
