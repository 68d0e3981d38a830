"""Chat templates: jinja2 source that comes with a model, rendered in a sandbox.

The template is untrusted data from the model file. As in transformers, jinja2's immutable sandbox
keeps it from Python's internals. The sandbox does not limit time or memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lsjax.data.files import one_line
from lsjax.data.tokenizer import Tokenizer


class ChatTemplateError(ValueError):
    """A chat template is missing, invalid, or rejects the messages; one line."""


class _Generation(Extension):
    """`{% generation %}`, which marks replies for training; a scope, whose content is unchanged."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(content, lineno=line)


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: dict[str, str],
) -> str:
    """Renders `messages` with `template`, as transformers' apply_chat_template does.

    Encode the result with `allow_special=True, add_bos=False`.

    Args:
      template: jinja2 source.
      messages: dicts with "role" and "content".
      add_generation_prompt: end with the opening of the assistant's turn.
      special_tokens: `bos_token` and `eos_token`, empty if missing.

    Raises ChatTemplateError if the template is invalid, is unsafe or rejects the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    # jinja2's own filter escapes <, > and &, but a prompt must keep them.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            {"bos_token": "", "eos_token": ""} | special_tokens,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,  # templates test for None rather than undefined
            documents=None,
        )
    except Exception as error:
        where = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ChatTemplateError(
            f"the chat template fails: {where}{name}{one_line(error)}"
        ) from error


def chat_prompt(
    tokenizer: Tokenizer,
    user: str,
    system: str | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> str:
    """`render_chat` of `system`, `history`, then `user`.

    Raises ChatTemplateError, also if the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise ChatTemplateError("this model has no chat template: use --prompt without --chat")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [*history, {"role": "user", "content": user}]
    return render_chat(tokenizer.chat_template, messages, special_tokens=tokenizer.special_tokens)


class Dialogue:
    """The messages so far, in the model's chat template.

    The next prompt keeps a reply's own ids: encoding its text again may give other tokens. If the
    template alters earlier messages, the complete chat is encoded again. The same
    holds for SentencePiece tokenizers, whose tokens depend on where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        self._tokenizer, self._system = tokenizer, system
        self.messages: list[dict[str, str]] = []
        self._known: tuple[str, list[int]] = "", []  # text and ids to the end of the last reply

    def prompt(self, user: str) -> tuple[str, list[int]]:
        """Text and ids of the prompt for a reply to `user`. Raises ChatTemplateError."""
        text = chat_prompt(self._tokenizer, user, self._system, self.messages)
        known, ids = self._known
        if ids and text.startswith(known) and not self._tokenizer.leading_spaces:
            return text, ids + self._tokenizer.encode(text[len(known) :], add_bos=False)
        return text, self._tokenizer.encode(text, add_bos=False)

    def add(
        self, user: str, prompt: tuple[str, list[int]], reply: str, reply_ids: list[int] | None
    ) -> None:
        """Adds a turn. reply_ids: tokens that spell exactly `reply`, if known."""
        self.messages.append({"role": "user", "content": user})
        self.messages.append({"role": "assistant", "content": reply})
        text, ids = prompt
        self._known = text + reply, [] if reply_ids is None else ids + reply_ids


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
