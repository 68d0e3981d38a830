"""A chat of many turns as token ids that grow at the end, so that a cache of them stays good."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsjax.data.chat import chat_prompt

if TYPE_CHECKING:
    from lsjax.data.tokenizer import Tokenizer


class Dialogue:
    """The messages so far, in the model's chat template.

    A reply's own ids stay in the prompt of the next turn: encoded again, its text may fall into
    other tokens. A template that changes what was said makes the whole chat be encoded again, and
    so does SentencePiece, whose tokens depend on where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        self._tokenizer, self._system = tokenizer, system
        self.messages: list[dict[str, str]] = []
        self._known: tuple[str, list[int]] = "", []  # text and ids to the end of the last reply

    def prompt(self, user: str) -> tuple[str, list[int]]:
        """Text and ids of the prompt for a reply to `user`.

        Raises ChatTemplateError as `chat_prompt` does.
        """
        text = chat_prompt(self._tokenizer, user, self._system, self.messages)
        known, ids = self._known
        if ids and text.startswith(known) and not self._tokenizer.leading_spaces:
            return text, ids + self._tokenizer.encode(text[len(known) :], add_bos=False)
        return text, self._tokenizer.encode(text, add_bos=False)

    def add(
        self, user: str, prompt: tuple[str, list[int]], reply: str, reply_ids: list[int] | None
    ) -> None:
        """Enters a turn. reply_ids: tokens that make exactly the text of the reply, if known."""
        self.messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": reply},
        ]
        text, ids = prompt
        self._known = text + reply, [] if reply_ids is None else ids + reply_ids
