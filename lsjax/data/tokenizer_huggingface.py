"""Tokenizers run by the `tokenizers` library: tokenizer.json, and plain bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from lsjax.data.tokenizer_bpe import (
    BYTE_PIECE,
    added_token,
    byte_characters,
    byte_level_bpe,
    set_bos,
)
from lsjax.data.tokenizer_settings import save_settings
from lsjax.data.tokenizers import Tokenizer, TokenizerError

MAX_TOKEN_ID = 1 << 24


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

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, for several eos, generation_config."""
        save_settings(self, Path(directory), "PreTrainedTokenizerFast")
        self._backend.save(str(Path(directory) / "tokenizer.json"))


class ByteTokenizer(HuggingFaceTokenizer):
    """Bytes of UTF-8 as ids 0..255, `<s>` 256, `</s>` 257: for tests and tiny models."""

    def __init__(self, *, add_bos: bool = True, chat_template: str | None = None):
        vocab = {character: byte for byte, character in byte_characters().items()}
        backend = byte_level_bpe(vocab, [], pre_tokenizers.ByteLevel(False, use_regex=False))
        backend.add_special_tokens([added_token("<s>"), added_token("</s>")])
        super().__init__(
            backend, bos_id=256, eos_ids=(257,), add_bos=add_bos, chat_template=chat_template
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
