"""Ids to text as they come: streaming equals decoding all at once, at O(1) a token.

A text is the bytes of its tokens, so the state is that of an incremental UTF-8 decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsjax.data.tokenizers import Tokenizer


class StreamDecoder:
    """Text of tokens as they come, never a part of a character: O(1) for each new token.

    All `push`es and `finish` together give `decode_continuation` of the new tokens.

    Args:
      tokenizer: whose ids come.
      prompt_ids: what goes before. None: some text, so a leading space is text; () is the start of
        a text, where SentencePiece drops its own leading space. A character that the prompt leaves
        unfinished is given with the token that completes it.
      skip_special: leave special tokens out instead of spelling them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Iterable[int] | None = None,
        *,
        skip_special: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._leading_spaces = 0 if prompt_ids is None else tokenizer.leading_spaces
        if prompt_ids is not None:
            self.push(prompt_ids)

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        return "".join(self._utf8.decode(piece) for piece in self._bytes(ids))

    def finish(self) -> str:
        """What is held back: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, ids: Iterable[int]) -> Iterator[bytes]:
        for token_id in map(int, ids):
            piece = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
            if piece and self._leading_spaces:
                # a special token keeps it: SentencePiece writes unknown as " ⁇ "
                if token_id not in self._tokenizer.special_spelling:
                    piece = piece.removeprefix(b" ")
                self._leading_spaces = 0 if piece else self._leading_spaces - 1
            yield piece


def decode_continuation(
    tokenizer: Tokenizer, prompt_ids: Iterable[int], new_ids: Iterable[int]
) -> str:
    """Text that `new_ids` add behind `prompt_ids`, special tokens left out.

    Unlike `decode(new_ids)` it keeps the space before a first word.
    """
    stream = StreamDecoder(tokenizer, prompt_ids)
    return stream.push(new_ids) + stream.finish()
