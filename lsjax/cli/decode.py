"""Continues prompts with a Llama: autoregressively, from an early exit, or self-speculatively."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.progress import Progress

from lsjax.cli.chat import Chat
from lsjax.cli.drafts import legend, marked, show_unmarked, stream
from lsjax.cli.engines import load_engine, make_strategies, open_model, trained_exits
from lsjax.cli.flags.decode import Arguments
from lsjax.cli.notes import notes_console, summary
from lsjax.cli.prompts import choose_requests, encode_requests
from lsjax.cli.setup import check_output, waiting
from lsjax.config import AnyPath, as_path, check
from lsjax.data.token_counts import add_written
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.interrupts import keeps
from lsjax.io.files import cache_directory
from lsjax.io.lines import Lines
from lsjax.model.exit_blocks import block_exits
from lsjax.terminal import CONTROLS, SafeConsole, verbatim
from lsjax.training.profiling import trace


def decode(arguments: Arguments) -> None:
    """Loads the model, decodes the prompts, and prints the texts.

    Raises ConfigError, CheckpointError, TokenizerError or OSError, each in one line, for bad input.
    """
    to_stdout = arguments.json == as_path("-")
    requests, notes = choose_requests(arguments), notes_console()
    with waiting(notes, f"opening {arguments.model.name}"):
        model = open_model(arguments)
    config = model.source.config
    data_axis = 1 if model.mesh is None else model.mesh.shape["data"]
    needed = -(-len(requests) // data_axis) * data_axis
    arguments = replace(arguments, batch_size=min(arguments.batch_size, needed))
    if not arguments.strategies and trained_exits(model):
        arguments = replace(arguments, strategies=("auto",))
    model = model._replace(flags=arguments)
    strategies = make_strategies(arguments, model)
    check(
        len(strategies) == 1,
        "several strategies, exit layers, draft lengths or confidences are given: give one value "
        "each to --strategy, --exit-layer, --num-draft-tokens and --draft-confidence",
    )
    prompts = [request.prompt for request in requests]
    requests = encode_requests(requests, arguments, model.tokenizer, config)
    if arguments.json is not None and not to_stdout:
        check_output(arguments.json, arguments.prompt_file)

    quiet = to_stdout and not arguments.interactive
    people = SafeConsole(stderr=to_stdout, quiet=quiet, soft_wrap=True)
    engine = load_engine(model, notes, strategy=strategies[0])
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    weights, cache = engine.memory_bytes(longest)
    is_int8 = arguments.weights == "int8"
    notes.print(
        f"{arguments.model.name}: {config.num_params / 1e6:.0f}M parameters, "
        f"{weights / 1e6:.0f} MB in {engine.model.dtype}{' and int8' * is_int8}; "
        f"cache {cache / 1e6:.0f} MB for {engine.batch_size} row{'s' * (engine.batch_size > 1)}"
    )
    tracing = nullcontext() if arguments.profile is None else trace(arguments.profile)
    with json_lines(arguments.json) as write, tracing:
        texts = Texts(engine, arguments, prompts, requests, people, write)
        if arguments.show_drafts:
            people.print(legend(people, engine.strategy))
        if arguments.interactive:
            options = dict(system=arguments.system, show_drafts=arguments.show_drafts)
            Chat(engine, requests[0], people, notes, finish=texts.add, **options).run()
        elif len(requests) == 1 and not to_stdout:
            texts.stream()
        else:
            generate_all(engine, requests, notes, texts.show)
    count_written(engine, texts.completions)
    if not arguments.interactive:
        conclude(notes, engine, texts.completions)


class Texts:
    """The finished texts: shows them to people, and passes them to `write` as lines of JSON.

    prompts: as they were given. requests: with token ids.
    """

    def __init__(
        self,
        engine: Engine,
        arguments: Arguments,
        prompts: Sequence[str],
        requests: Sequence[Request],
        people: Console,
        write: Callable[[str], None],
    ):
        self.completions: list[Completion] = []
        self._engine, self._people, self._write = engine, people, write
        self._prompts, self._requests = prompts, requests
        self._show_drafts, self._is_chat = arguments.show_drafts, arguments.chat

    def add(self, prompt: str, completion: Completion) -> None:
        """Keeps and writes a completion."""
        self.completions.append(replace(completion, prompt=prompt))
        self._write(as_line(self.completions[-1]))

    def stream(self) -> None:
        """Shows the text of the only prompt as it is decoded."""
        options = dict(show_drafts=self._show_drafts, opening=self._opening(0))
        completion = stream(self._people, self._engine, self._requests[0], **options)
        self.add(self._prompts[0], completion)
        self._show_alone(0, completion)

    def show(self, index: int, completion: Completion) -> None:
        """Shows a finished text."""
        self.add(self._prompts[index], completion)
        self._people.print(verbatim(self._opening(index)), style="dim")
        text = verbatim(completion.text)
        if self._show_drafts:
            ids = self._requests[index].prompt
            text = marked(self._people, self._engine.tokenizer, ids, completion)
        self._people.print(text)
        self._people.print()
        self._show_alone(index, completion)

    def _opening(self, index: int) -> str:
        """The prompt as it stands before its text. An answer of a chat begins on a line below."""
        return self._prompts[index] + "\n\n" * self._is_chat

    def _show_alone(self, index: int, completion: Completion) -> None:
        if self._show_drafts:
            show_unmarked(self._people, self._opening(index) + completion.text)


def conclude(notes: Console, engine: Engine, completions: Sequence[Completion]) -> None:
    """Prints the speed, and a hint if few drafts were accepted."""
    compiling = f"{engine.programs.compile_seconds:.1f} s compiling"
    notes.print(f"{summary(completions, engine.decode_seconds)}; {compiling}")
    exit_layer = engine.strategy.exit_layer
    drafted = sum(c.drafted for c in completions)
    accepted = sum(c.accepted for c in completions)
    if exit_layer and accepted < 0.3 * drafted:
        has_block = exit_layer in block_exits(engine.model)
        why = (
            "Its block may need more training, or answers that are more like this text."
            if has_block
            else "Early-exit drafts slow down models that were not trained with LayerSkip."
        )
        notes.print(
            f"Few drafts of exit {exit_layer} were accepted, though the text stays the same. {why}"
        )


def count_written(engine: Engine, completions: Sequence[Completion]) -> None:
    """Counts the tokens, if a draft vocabulary may be chosen by them later."""
    strategy = engine.strategy
    if isinstance(strategy, Adaptive) and strategy.exits and strategy.vocabulary is None:
        ids = (token for one in completions for token in one.token_ids)
        with suppress(OSError):  # a cache that can't be written
            add_written(cache_directory(), engine.tokenizer, ids)


def generate_all(
    engine: Engine,
    requests: Sequence[Request],
    notes: Console,
    show: Callable[[int, Completion], None],
) -> None:
    """Shows texts in prompt order, with a progress bar if `notes` is a terminal. If decoding is
    interrupted, texts that wait for earlier ones are shown at the end."""
    missing, waiting = deque(range(len(requests))), {}

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("decoding", total=len(requests))

        def ended(index: int, completion: Completion) -> None:
            waiting[index] = completion
            while missing and missing[0] in waiting:
                first = missing.popleft()
                show(first, waiting.pop(first))
            progress.advance(task)

        def show_waiting() -> None:
            for index in sorted(waiting):
                show(index, waiting.pop(index))

        keeps("the finished texts are written", show_waiting)
        try:
            engine.generate(requests, on_completion=ended)
        finally:
            show_waiting()


@contextmanager
def json_lines(path: AnyPath | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes a line of JSON to the output, if there is one. An existing file
    is emptied."""
    if path is None:
        yield lambda line: None
    elif path == as_path("-"):
        yield partial(print, end="", flush=True)
    else:
        with closing(Lines(path, empty=True)) as lines:
            yield lines.write


def as_line(completion: Completion) -> str:
    """A completion as a line of JSON. It has no control characters, as it may go to a terminal."""
    line = json.dumps(completion.to_json(), ensure_ascii=False)
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"
