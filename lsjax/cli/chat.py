"""A chat in the terminal."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator

from rich.console import Console

from lsjax.cli.show import LEGEND, Colours, stream, summary
from lsjax.config import ConfigError
from lsjax.data.dialogue import Dialogue
from lsjax.decoding.completion import Completion
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request

HELP = "Ctrl-C stops an answer, /new forgets the chat, Ctrl-D ends."


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
    """Reads messages and streams replies until the input ends. The cache stays between turns: only
    what is new is read. Each turn has the next seed.

    finish: called with message and completion after each turn.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history for `input`)

    notes.print(HELP)
    if show_drafts:
        people.print(LEGEND)
    dialogue, conversation = Dialogue(engine.tokenizer, system), Conversation()
    seed = default.sampling.seed
    while True:
        try:
            message = input("> ")
        except EOFError:
            people.print()
            return
        except KeyboardInterrupt:
            people.print()
            notes.print(HELP)
            continue
        if message.strip() == "/new":
            dialogue, conversation = Dialogue(engine.tokenizer, system), Conversation()
        elif message.strip():
            prompt = dialogue.prompt(message)
            sampling = dataclasses.replace(default.sampling, seed=seed)
            request = dataclasses.replace(default, prompt=prompt[1], sampling=sampling)
            colours = Colours(engine.tokenizer, prompt[1]) if show_drafts else None
            try:
                with noted_interrupt() as interrupted:
                    updates = engine.watch(
                        request, conversation=conversation, cancelled=interrupted
                    )
                    completion = stream(people, updates, colours)
            except ConfigError as error:  # the chat has become too long
                notes.print(f"{error}; /new forgets the chat")
                continue
            seed += 1
            notes.print(summary([completion], completion.decode_seconds))
            ids = completion.token_ids
            if completion.finish_reason == "eos":
                ids = ids[:-1]
            known = completion.finish_reason != "stop"  # a stop string may end inside a token
            dialogue.add(message, prompt, completion.text, ids if known else None)
            finish(message, completion)


@contextlib.contextmanager
def noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted; the second is a KeyboardInterrupt as ever."""
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
