"""Tokenizers that the `tokenizers` library runs: tokenizer.json, BPE vocabularies, plain bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from lsjax.data.tokenizer import Tokenizer, TokenizerError

MAX_TOKEN_ID = 1 << 24
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of a byte
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` pipeline (a tokenizer.json).

    Decoders known are ByteLevel (Llama 3, SmolLM) and the SentencePiece-like sequence of Replace,
    ByteFallback, Fuse, Strip or Metaspace (Llama 2).

    Args:
      backend: the pipeline; its truncation and padding are switched off.
      bos_id, eos_ids, chat_template: as in `Tokenizer`.
      add_bos: None asks the pipeline's post-processor.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id, self.eos_ids, self.chat_template = bos_id, tuple(eos_ids), chat_template
        has_bos = backend.encode("").ids[:1] == [bos_id]
        self.add_bos = has_bos if add_bos is None else add_bos and bos_id is not None
        if self.add_bos != has_bos:
            set_bos(backend, bos_id if self.add_bos else None)
        added = backend.get_added_tokens_decoder()
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        if not 0 < self.vocab_size <= MAX_TOKEN_ID:
            raise TokenizerError(f"the largest token id is {self.vocab_size - 1}: a damaged file")
        piece_bytes, self.leading_spaces = _piece_decoder(backend)
        self._pieces = {i: piece_bytes(token) for token, i in vocab.items()}
        self._pieces |= {i: token.content.encode() for i, token in added.items()}
        self.special_spelling = {i: token.content for i, token in added.items() if token.special}
        self._pieces |= dict.fromkeys(self.special_spelling, b"")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # A second pipeline, since the switch is a state of the whole object (threads).
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        backend = self._backend if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def _save_model(self, directory: Path) -> str:
        self._backend.save(str(directory / "tokenizer.json"))
        return "PreTrainedTokenizerFast"


class ByteTokenizer(HuggingFaceTokenizer):
    """Bytes of UTF-8 as ids 0..255, `<s>` 256, `</s>` 257: for tests and tiny models."""

    def __init__(self, *, add_bos: bool = True, chat_template: str | None = None):
        vocab = {character: byte for byte, character in byte_characters().items()}
        backend = byte_level_bpe(vocab, [], pre_tokenizers.ByteLevel(False, use_regex=False))
        backend.add_special_tokens([added_token("<s>"), added_token("</s>")])
        super().__init__(
            backend, bos_id=256, eos_ids=(257,), add_bos=add_bos, chat_template=chat_template
        )


def llama3_words() -> pre_tokenizers.PreTokenizer:
    """Llama 3's split of a text into words, spelled as bytes."""
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


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


def _piece_decoder(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], int]:
    """A function from a vocabulary entry to its bytes, and the number of leading spaces dropped."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        table = {character: byte for byte, character in byte_characters().items()}

        def byte_level(token: str) -> bytes:
            known = all(character in table for character in token)
            return bytes(table[c] for c in token) if known else token.encode()

        return byte_level, 0
    space, leading = "▁", 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": space}, "content": " "}:
                pass
            case {"type": "Metaspace", "replacement": space}:
                leading = int(step.get("prepend_scheme") != "never")
            case {"type": "Strip", "content": " ", "start": leading, "stop": 0}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise TokenizerError(
                    f"its decoder ({step['type']}) is unknown; known are ByteLevel, Metaspace and "
                    "SentencePiece's Replace, ByteFallback, Fuse, Strip"
                )

    def sentencepiece_like(token: str) -> bytes:
        byte = BYTE_PIECE.fullmatch(token) if "ByteFallback" in kinds else None
        return bytes.fromhex(byte[1]) if byte else token.replace(space, " ").encode()

    return sentencepiece_like, leading
