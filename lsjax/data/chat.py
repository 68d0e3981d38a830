"""Chats as texts, by the chat templates that models come with."""

import json
import re
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lsjax.data.tokenizer import Tokenizer
from lsjax.io.files import one_line


class ChatTemplateError(ValueError):
    """A chat template is missing, invalid, or rejects the messages; one line."""


def render_chat(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """Renders messages with the chat template, as transformers' apply_chat_template does.

    Encode the result with `allow_special=True, add_bos=False`. As in transformers, jinja2's
    immutable sandbox keeps Python's internals from the template, which is untrusted data from the
    model's files. The sandbox does not limit time or memory.

    messages: dicts with "role" and "content". add_generation_prompt: end with the opening of the
    assistant's turn.

    Raises ChatTemplateError if the template is missing, invalid, unsafe or rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise ChatTemplateError("this model has no chat template: use --prompt without --chat")

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    # A generation block marks a reply for training. Like `with`, it is a scope.
    template = re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", tokenizer.chat_template)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # jinja2's own filter escapes <, > and &, but a prompt must keep them.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Templates test for None rather than undefined.
    variables = {"bos_token": "", "eos_token": "", "tools": None, "documents": None}
    variables |= tokenizer.special_tokens
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        return environment.from_string(template).render(variables)
    except Exception as error:
        where = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise ChatTemplateError(f"the chat template fails: {where}{one_line(error)}") from error


class Dialogue:
    """The messages so far, in the model's chat template.

    The next prompt keeps a reply's own ids: encoding its text again may give other tokens. The
    complete chat is encoded again if the template alters earlier messages. The same holds for
    SentencePiece tokenizers, whose tokens depend on where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        self._tokenizer = tokenizer
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._known: tuple[str, list[int]] = "", []  # text and ids to the end of the last reply

    def prompt(self, user: str) -> tuple[str, list[int]]:
        """Text and ids of the prompt for a reply to `user`. Raises ChatTemplateError."""
        text = render_chat(self._tokenizer, [*self.messages, {"role": "user", "content": user}])
        known, ids = self._known
        if not text.startswith(known) or self._tokenizer.leading_spaces:
            known, ids = "", []
        return text, ids + self._tokenizer.encode(text.removeprefix(known), add_bos=False)

    def add(
        self, user: str, prompt: tuple[str, list[int]], reply: str, reply_ids: list[int] | None
    ) -> None:
        """Adds a turn. reply_ids: tokens that spell exactly `reply`, if known."""
        self.messages.append({"role": "user", "content": user})
        self.messages.append({"role": "assistant", "content": reply})
        text, ids = prompt
        self._known = ("", []) if reply_ids is None else (text + reply, ids + reply_ids)
