"""Continues prompts with a Llama: autoregressively, from an early exit, or self-speculatively."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

from rich.console import Console
from rich.progress import Progress

from lsjax.cli.engines import load_engine, make_strategies, open_model, trained_exits
from lsjax.cli.flags.decode import Arguments
from lsjax.cli.prompts import chat, choose_requests, encode_requests
from lsjax.cli.setup import check_output
from lsjax.cli.show import coloured, legend, notes_console, stream, summary
from lsjax.config import AnyPath, as_path, check
from lsjax.data.vocabulary import add_written
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.interrupts import keeps
from lsjax.io.files import cache_directory
from lsjax.io.lines import Lines
from lsjax.terminal import CONTROLS, SafeConsole, verbatim
from lsjax.training.profiling import trace


def decode(arguments: Arguments) -> None:
    """Loads the model, decodes the prompts, and prints the texts.

    Raises ConfigError, CheckpointError, TokenizerError or OSError, each in one line, for bad input.
    """
    to_stdout = arguments.json == as_path("-")
    requests = choose_requests(arguments)
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
    notes = notes_console()
    engine = load_engine(model, notes, strategy=strategies[0])
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    weights, cache = engine.memory_bytes(longest)
    notes.print(
        f"{arguments.model.name}: {config.num_params / 1e6:.0f}M parameters, "
        f"{weights / 1e6:.0f} MB in {engine.model.dtype}; "
        f"cache {cache / 1e6:.0f} MB for {engine.batch_size} row{'s' * (engine.batch_size > 1)}"
    )
    completions: list[Completion] = []
    tracing = nullcontext() if arguments.profile is None else trace(arguments.profile)
    with json_lines(arguments.json) as write, tracing:

        def finish(prompt: str, completion: Completion) -> None:
            completions.append(replace(completion, prompt=prompt))
            write(as_line(completions[-1]))

        show_drafts = arguments.show_drafts
        options = dict(show_drafts=show_drafts, finish=finish)
        if show_drafts:
            people.print(legend(engine.strategy))
        if arguments.interactive:
            chat(engine, requests[0], people, notes, system=arguments.system, **options)
        elif len(requests) == 1 and not to_stdout:
            people.print(verbatim(prompts[0]), style="dim")
            finish(prompts[0], stream(people, engine, requests[0], show_drafts=show_drafts))
        else:
            generate_all(engine, prompts, requests, people, notes, **options)
    count_written(engine, completions)
    if not arguments.interactive:
        conclude(notes, engine, completions)


def conclude(notes: Console, engine: Engine, completions: Sequence[Completion]) -> None:
    """Prints the speed, and a hint if few drafts were accepted."""
    compiling = f"{engine.programs.compile_seconds:.1f} s compiling"
    notes.print(f"{summary(completions, engine.decode_seconds)}; {compiling}")
    exit_layer = engine.strategy.exit_layer
    drafted = sum(c.drafted for c in completions)
    accepted = sum(c.accepted for c in completions)
    if exit_layer and accepted < 0.3 * drafted:
        notes.print(
            f"Few drafts of exit {exit_layer} were accepted. Early-exit drafts slow down "
            "models that were not trained with LayerSkip, though the text stays the same."
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
    prompts: Sequence[str],
    requests: Sequence[Request],
    people: Console,
    notes: Console,
    *,
    show_drafts: bool,
    finish: Callable[[str, Completion], None],
) -> None:
    """Prints texts in prompt order, with a progress bar if `notes` is a terminal. If decoding is
    interrupted, texts that wait for earlier ones are printed at the end."""
    missing, waiting = deque(range(len(requests))), {}

    def show(index: int, completion: Completion) -> None:
        finish(prompts[index], completion)
        people.print(verbatim(prompts[index]), style="dim")
        if show_drafts:
            people.print(coloured(engine.tokenizer, requests[index].prompt, completion))
        else:
            people.print(verbatim(completion.text))
        people.print()

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
