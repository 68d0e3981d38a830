"""A chat in the terminal."""

import contextlib
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rich.console import Console

from lsjax.cli.drafts import show_unmarked, stream
from lsjax.cli.notes import summary
from lsjax.config import ConfigError
from lsjax.data.chat import ChatTemplateError, Dialogue
from lsjax.data.tokenizer import TokenizerError
from lsjax.decoding.completion import Completion
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.interrupts import noted, raised

COMMANDS = "Ctrl-C stops an answer, /new forgets the chat, Ctrl-D ends."


class Chat:
    """Streams replies to messages. The cache is kept between turns, so only new tokens are
    processed. Each turn has the next seed.

    default: the request of a reply without its prompt. finish: called with message and completion
    after each turn.
    """

    def __init__(
        self,
        engine: Engine,
        default: Request,
        people: Console,
        notes: Console,
        *,
        system: str | None = None,
        show_drafts: bool = False,
        finish: Callable[[str, Completion], None],
    ):
        self._engine, self._request, self._system = engine, default, system
        self._people, self._notes = people, notes
        self._show_drafts, self._finish = show_drafts, finish
        self._forget()

    def _forget(self) -> None:
        self._dialogue = Dialogue(self._engine.tokenizer, self._system)
        self._conversation = Conversation()

    @raised()
    def run(self) -> None:
        """Reads messages and answers them until the input ends.

        Ctrl-C stops an answer, and the chat continues from there. A second Ctrl-C in the same turn
        discards the turn.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history for `input`)

        people, notes = self._people, self._notes
        notes.print(COMMANDS)
        while True:
            message = ""
            try:
                with contextlib.redirect_stdout(people.file):  # where the prompt goes
                    message = input("> ")
                self._take(message)
            except EOFError:
                people.print()
                return
            except KeyboardInterrupt:
                people.print()
                forgotten = "cancelled: this message and its answer are forgotten"
                notes.print(forgotten if message else COMMANDS)
            except UnicodeDecodeError:
                notes.print("that was not UTF-8: type it again")
            except ConfigError as error:  # the chat has become too long
                notes.print(f"{error}; /new forgets the chat")
            except (ChatTemplateError, TokenizerError) as error:
                notes.print(str(error))

    def _take(self, message: str) -> None:
        """Obeys a command, or answers."""
        command = message.strip()
        if command == "/new":
            self._forget()
        elif re.fullmatch(r"/\w+", command):
            self._notes.print(f"{command} is not a command. {COMMANDS}")
        elif command:
            self._answer(message)

    def _answer(self, message: str) -> None:
        prompt = self._dialogue.prompt(message)
        request = replace(self._request, prompt=prompt[1])
        with noted(signal.SIGINT) as interrupts:
            completion = stream(
                self._people,
                self._engine,
                request,
                show_drafts=self._show_drafts,
                conversation=self._conversation,
                cancelled=partial(bool, interrupts),
            )
            if self._show_drafts:
                show_unmarked(self._people, completion.text)
            self._notes.print(summary([completion], completion.decode_seconds))
            self._finish(message, completion)
            # A stop string may end inside a token. The end token is not in the text.
            ids = completion.token_ids
            known = {"stop": None, "eos": ids[:-1]}.get(completion.finish_reason, ids)
            self._dialogue.add(message, prompt, completion.text, known)
        self._request = replace(request, sampling=request.sampling.of_text(1))
