"""A chat in the terminal."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

from lsjax.cli.show import Colours, legend, stream, summary
from lsjax.config import ConfigError
from lsjax.data.tokenizer import ChatTemplateError, Dialogue, TokenizerError
from lsjax.decoding.batching import Conversation
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request

HELP = "Ctrl-C stops an answer, /new forgets the chat, Ctrl-D ends."
PROMPT = "> "


def chat(
    engine: Engine,
    default: Request,
    people: Console,
    notes: Console,
    *,
    system: str | None = None,
    show_drafts: bool = False,
    finish: Callable[[str, Completion], None],
) -> None:
    """Reads messages and streams replies until the input ends. The cache is kept between turns, so
    only new tokens are processed. Each turn has the next seed.

    Ctrl-C stops an answer, and the chat continues from there. A second Ctrl-C in the same turn
    discards the turn. finish: called with message and completion after each turn.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history for `input`)

    notes.print(HELP)
    if show_drafts:
        people.print(legend(engine.strategy))
    dialogue, conversation = Dialogue(engine.tokenizer, system), Conversation()
    seed = default.sampling.seed

    def turn(message: str, interrupted: Callable[[], bool]) -> None:
        prompt = dialogue.prompt(message)
        sampling = dataclasses.replace(default.sampling, seed=seed)
        request = dataclasses.replace(default, prompt=prompt[1], sampling=sampling)
        colours = Colours(engine.tokenizer, prompt[1]) if show_drafts else None
        updates = engine.watch(request, conversation=conversation, cancelled=interrupted)
        with contextlib.closing(updates):
            completion = stream(people, updates, colours)
        notes.print(summary([completion], completion.decode_seconds))
        finish(message, completion)
        ids = completion.token_ids
        if completion.finish_reason == "eos":
            ids = ids[:-1]
        known = completion.finish_reason != "stop"  # a stop string may end inside a token
        dialogue.add(message, prompt, completion.text, ids if known else None)

    while True:
        try:
            message = ask(people)
        except EOFError:
            people.print()
            return
        except KeyboardInterrupt:
            people.print()
            notes.print(HELP)
            continue
        except UnicodeDecodeError:
            notes.print("that was not UTF-8: type it again")
            continue
        if message.strip() == "/new":
            dialogue, conversation = Dialogue(engine.tokenizer, system), Conversation()
        elif message.strip():
            try:
                with noted_interrupt() as interrupted:
                    turn(message, interrupted)
                seed = (seed + 1) % 2**32
            except ConfigError as error:  # the chat has become too long
                notes.print(f"{error}; /new forgets the chat")
            except (ChatTemplateError, TokenizerError) as error:
                notes.print(str(error))
            except KeyboardInterrupt:
                people.print()
                notes.print("cancelled: this message and its answer are forgotten")


def ask(people: Console) -> str:
    """Reads a line of input. The prompt goes to `people`, which may not be standard output."""
    if people.file is sys.stdout:
        return input(PROMPT)
    people.print(PROMPT, end="")
    return input()


@contextlib.contextmanager
def noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C is only noted. The second raises KeyboardInterrupt."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
