"""One interface for SentencePiece, tokenizer.json, Llama-3's tiktoken file, GGUF and plain bytes.

Encoding is left to the `sentencepiece` and `tokenizers` libraries. Decoding is done here, from one
table of id -> bytes, the same for every kind of tokenizer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from lsjax.data.detokenize import StreamDecoder

# Digits, runs of whitespace, contractions and rare characters: where tokenizers with one and the
# same vocabulary differ.
PROBE = "Hello  world!\n\n\tdef f(x):\n        return 12345 + 6.78  # it's\r\n ¿Qué? 你好 ﬁ 🙂👍🏽 "


# Tokens that a tokenizer may have more than the model's table has rows.
MOST_EXTRA = 64


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded or used; one line with the file, the fault and the fix."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
      vocab_size: largest id + 1; fewer if the model's table has fewer rows (`fitted`).
      bos_id: id of the beginning-of-text token, or None.
      eos_ids: ids that end a generated text, the tokenizer's own first.
      add_bos: whether `encode` puts `bos_id` first unless told otherwise.
      chat_template: jinja2 source, or None.
      special_spelling: id of each special token -> how it is spelled.
      leading_spaces: how many leading spaces `decode` drops, at most one of each token: the space
        that SentencePiece puts before a text on encoding.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None
    special_spelling: dict[int, str]
    leading_spaces: float = 0
    _pieces: dict[int, bytes]  # what a token adds to a text; nothing for special tokens

    @abstractmethod
    def _encode(self, text: str, allow_special: bool) -> list[int]: ...

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Writes files from which `load_tokenizer` and transformers' AutoTokenizer read it."""

    def encode(
        self, text: str, *, add_bos: bool | None = None, allow_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
          text: any valid Unicode.
          add_bos: put `bos_id` first; None does what the tokenizer's files say (`self.add_bos`).
            No end token is ever added. A text made by a chat template has its own: pass False.
          allow_special: True reads the spelling of a special token ("</s>", "<|eot_id|>") as that
            token, as transformers does. False keeps it plain text: for untrusted text and for
            training text. Tokens that were added but not declared special are always read.

        Raises:
          TokenizerError: `text` holds lone surrogates, or there is no `bos_id` to add, or the
            model has no row for a token (`fitted`).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is not valid Unicode (a lone surrogate): "
                "decode the input as UTF-8 with errors='replace'"
            ) from error
        ids = self._encode(text, allow_special)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError("this tokenizer has no beginning-of-text token: add_bos=False")
            ids = [self.bos_id, *ids]
        extra = next((token for token in ids if token >= self.vocab_size), None)
        if extra is not None:
            spelling = self.token_bytes(extra, skip_special=False).decode(errors="replace")
            raise TokenizerError(
                f"the text contains {spelling!r} (token {extra}), but the model has only "
                f"{self.vocab_size} tokens: remove it from the text"
            )
        return ids

    def fitted(self, rows: int) -> Tokenizer:
        """This tokenizer for a model whose table has so many rows.

        A few tokens may be without a row, such as a <pad> that was added. `encode` then refuses a
        text that contains one.

        Raises TokenizerError where there are more than MOST_EXTRA of them.
        """
        if self.vocab_size <= rows:
            return self
        if self.vocab_size > rows + MOST_EXTRA:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, but the model's table {rows} rows: "
                "give the model's own tokenizer"
            )
        smaller = copy.copy(self)
        smaller.vocab_size = rows
        return smaller

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD.

        Special tokens are left out, or spelled if `skip_special` is False. Ids without a token
        (the padding of an embedding table) add nothing.
        """
        stream = StreamDecoder(self, prompt_ids=(), skip_special=skip_special)
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What one token adds to a text that has begun: UTF-8, maybe a part of a character."""
        if not skip_special and token_id in self.special_spelling:
            return self.special_spelling[token_id].encode()
        return self._pieces.get(token_id, b"")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Spelling of `bos_token` and `eos_token`, as chat templates name them."""
        named = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {
            name: self.token_bytes(token_id, skip_special=False).decode(errors="replace")
            for name, token_id in named.items()
            if token_id is not None
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the bytes of all tokens and of the ids of a fixed text.

        It depends on ids only, not on the kind of file, nor on bos, eos or chat template.
        """
        digest = hashlib.sha256()
        for token_id in sorted(self._pieces):
            piece = self.token_bytes(token_id, skip_special=False)
            digest.update(struct.pack("<II", token_id, len(piece)) + piece)
        digest.update(json.dumps(self._encode(PROBE, allow_special=True)).encode())
        return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
