"""Text to token ids and back, for tokenizers of every kind.

The `sentencepiece` and `tokenizers` libraries encode. This module decodes, from one table of
id -> bytes. A text is the bytes of its tokens, so streaming only decodes UTF-8 incrementally.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property

from lsjax.config import AnyPath, as_path
from lsjax.io.files import read_json, write_json

# Tokenizers with equal vocabularies may split digits, whitespace or contractions differently.
PROBE = "Hello  world!\n\n\tdef f(x):\n        return 12345 + 6.78  # it's\r\n ¿Qué? 你好 ﬁ 🙂👍🏽 "
MOST_EXTRA = 64  # maximum number of tokens without a row in the model's table


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded or used; one line with the file, the fault and the fix."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int  # largest id + 1, or the rows of the model's table if fewer (`fitted`)
    bos_id: int | None = None  # the beginning-of-text token
    eos_ids: tuple[int, ...] = ()  # end a generated text; the tokenizer's own is first
    add_bos: bool = False  # whether `encode` puts `bos_id` first unless told otherwise
    chat_template: str | None = None  # jinja2 source
    special_spelling: dict[int, str]  # of each special token, by its id
    # Leading spaces that `decode` drops, at most one per token: SentencePiece puts one first.
    leading_spaces: float = 0
    _pieces: dict[int, bytes]  # bytes that a token adds to a text; empty for special tokens

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]: ...

    @abstractmethod
    def _save_model(self, directory: AnyPath) -> str:
        """Writes the vocabulary; returns the name of the transformers class that reads it."""

    def encode(
        self, text: str, *, add_bos: bool | None = None, allow_special: bool = True
    ) -> list[int]:
        """Token ids of one text; arguments as for `encode_batch`."""
        return self.encode_batch([text], add_bos=add_bos, allow_special=allow_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool | None = None, allow_special: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, which may be any valid Unicode.

        Args:
          add_bos: put `bos_id` first; None follows the tokenizer's files (`self.add_bos`).
            Chat templates add their own: pass False.
          allow_special: True reads the spelling of a special token ("</s>", "<|eot_id|>") as that
            token, as transformers does. False keeps it plain text, for untrusted and training text.
            Added tokens that are not special are always read.

        Raises TokenizerError for lone surrogates, a token without a row in the model's table, or a
        missing `bos_id`.
        """
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has a lone surrogate: give UTF-8 ({error})") from None
        batch = self._encode_batch(texts, allow_special)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError("this tokenizer has no beginning-of-text token: add_bos=False")
            batch = [[self.bos_id, *ids] for ids in batch]
        extra = max((max(ids, default=0) for ids in batch), default=0)
        if extra >= self.vocab_size:
            raise TokenizerError(
                f"the text contains {self.spelling(extra)!r} (token {extra}), but the model has "
                f"only {self.vocab_size} tokens: remove it from the text"
            )
        return batch

    def fitted(self, rows: int) -> Tokenizer:
        """This tokenizer for a model whose table has this many rows.

        At most MOST_EXTRA tokens may lack a row, such as an added <pad>. `encode` then rejects a
        text that contains one. Raises TokenizerError if more tokens lack a row.
        """
        if self.vocab_size <= rows:
            return self
        if self.vocab_size > rows + MOST_EXTRA:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens, but the model's table has {rows} "
                "rows: use the model's own tokenizer"
            )
        smaller = copy.copy(self)
        smaller.vocab_size = rows
        return smaller

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of a complete sequence; bytes that are not UTF-8 become U+FFFD.

        Special tokens are spelled out if `skip_special` is False. Unknown ids add nothing.
        """
        stream = StreamDecoder(self, ())
        stream.skip_special = skip_special
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """UTF-8 bytes that a token adds inside a text; may be only part of a character."""
        if not skip_special and token_id in self.special_spelling:
            return self.special_spelling[token_id].encode()
        return self._pieces.get(token_id, b"")

    def spelling(self, token_id: int) -> str:
        """A token as text; special tokens are spelled out."""
        return self.token_bytes(token_id, skip_special=False).decode(errors="replace")

    def token_id(self, spelling: str) -> int | None:
        """Smallest id of a token with this spelling, or None."""
        wanted = spelling.encode()
        ids = (i for i in self._pieces if self.token_bytes(i, skip_special=False) == wanted)
        return min(ids, default=None)

    def save(self, directory: str | AnyPath) -> None:
        """Writes files that `load_tokenizer` and transformers' AutoTokenizer read."""
        directory = as_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": self._save_model(directory),
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", config)
        if len(self.eos_ids) > 1:  # tokenizer_config.json holds only one
            file = directory / "generation_config.json"
            generation = read_json(file, TokenizerError) if file.exists() else {}
            write_json(file, generation | {"eos_token_id": list(self.eos_ids)})

    @property
    def special_tokens(self) -> dict[str, str]:
        """Spelling of `bos_token` and `eos_token`, as chat templates name them."""
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        return {name: self.spelling(i) for name, i in ids.items() if i is not None}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the bytes of all tokens and of the ids of a fixed text.

        It ignores the file type, bos, eos and the chat template.
        """
        digest = hashlib.sha256()
        for token_id in sorted(self._pieces):
            piece = self.token_bytes(token_id, skip_special=False)
            digest.update(struct.pack("<II", token_id, len(piece)) + piece)
        digest.update(json.dumps(self._encode_batch([PROBE], True)[0]).encode())
        return digest.hexdigest()


class StreamDecoder:
    """Decodes tokens as they arrive, and returns only complete characters.

    All `push`es and `finish` together return the text that the new tokens add after the prompt.
    The token that completes a character returns all of it, even if the prompt began it.

    prompt_ids: tokens before the new ones. None stands for some text, after which leading spaces
    are kept. () is the start of a text, where SentencePiece drops its own leading space.
    """

    skip_special = True  # as in `Tokenizer.decode`

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] | None = None):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._leading_spaces = 0 if prompt_ids is None else tokenizer.leading_spaces
        self.push(() if prompt_ids is None else prompt_ids)

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete."""
        text = ""
        for token_id in map(int, ids):
            piece = self._tokenizer.token_bytes(token_id, skip_special=self.skip_special)
            if piece and self._leading_spaces:
                # Special tokens keep it: SentencePiece writes unknown as " ⁇ ".
                if token_id not in self._tokenizer.special_spelling:
                    piece = piece.removeprefix(b" ")
                self._leading_spaces = 0 if piece else self._leading_spaces - 1
            text += self._utf8.decode(piece)
        return text

    def finish(self) -> str:
        """Remaining text: U+FFFD for an incomplete character, else empty."""
        return self._utf8.decode(b"", final=True)
