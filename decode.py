"""Continues prompts with a Llama: autoregressively, from an early exit, or self-speculatively.

    python decode.py --model PATH --prompt "Once upon a time"
    python decode.py --model PATH --prompt-file prompts.jsonl --strategy self_speculative \\
        --exit-layer 8 --num-draft-tokens 4 --json results.jsonl
    python decode.py --model PATH --interactive
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TextIO

from rich.console import Console
from rich.progress import Progress

from lsjax.cli.chat import chat
from lsjax.cli.flags import load_engine, open_model, parse_flags
from lsjax.cli.prompts import Arguments, choose_requests, encode_requests
from lsjax.cli.setup import check_output, ended_by_sigterm, one_line_errors
from lsjax.cli.show import (
    Colours,
    coloured,
    legend,
    notes_console,
    stream,
    summary,
    verbatim,
)
from lsjax.cli.strategies import make_strategies, trained_exits
from lsjax.config import Path, as_path
from lsjax.data.files import cache_directory
from lsjax.data.vocabulary import add_written
from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.strategy import Strategy
from lsjax.training.profiling import trace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Bad input exits with code 2."""
    with one_line_errors(), ended_by_sigterm():
        decode(parse_flags(Arguments, argv, __doc__))
    return 0


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
    fewer = dataclasses.replace(arguments, batch_size=min(arguments.batch_size, needed))
    model = model._replace(flags=fewer)
    if not arguments.strategies:
        name = "auto" if trained_exits(model) else "autoregressive"
        arguments = dataclasses.replace(arguments, strategies=(name,))
    (strategy,) = make_strategies(arguments, model)
    encoded = encode_requests(requests, arguments, model.tokenizer, config)
    if arguments.json is not None and not to_stdout:
        check_output(arguments.json, arguments.prompt_file)

    plain = dict(highlight=False, markup=False, emoji=False, soft_wrap=True)
    people, notes = Console(stderr=to_stdout, **plain), notes_console()
    engine = load_engine(model, notes, strategy=strategy)
    longest = max(
        len(ids) + request.max_new_tokens for request, ids in zip(requests, encoded, strict=True)
    )
    weights, cache = engine.memory_bytes(longest)
    notes.print(
        f"{arguments.model.name}: {config.num_params / 1e6:.0f}M parameters, "
        f"{weights / 1e6:.0f} MB in {engine.model.dtype}; "
        f"cache {cache / 1e6:.0f} MB for {engine.batch_size} row{'s' * (engine.batch_size > 1)}"
    )

    completions: list[Completion] = []
    profile = arguments.profile
    tracing = nullcontext() if profile is None else trace(profile)
    with json_lines(arguments.json) as lines, tracing:

        def finish(prompt: str, completion: Completion) -> None:
            completion = dataclasses.replace(completion, prompt=prompt)
            completions.append(completion)
            if lines:
                print(json.dumps(completion.to_json(), ensure_ascii=False), file=lines, flush=True)

        show_drafts = arguments.show_drafts
        if arguments.interactive:
            options = dict(system=arguments.system, show_drafts=show_drafts, finish=finish)
            chat(engine, requests[0], people, notes, **options)
            count_written(engine, completions)
            return
        if show_drafts:
            people.print(legend(strategy))
        if len(requests) == 1 and not to_stdout:
            finish(
                requests[0].prompt, stream_one(engine, requests[0], encoded[0], people, show_drafts)
            )
        else:
            shown = None if to_stdout else people
            generate_all(engine, requests, encoded, shown, notes, show_drafts, finish)
    count_written(engine, completions)
    compiling = f"{engine.programs.compile_seconds:.1f} s compiling"
    notes.print(f"{summary(completions, engine.decode_seconds)}; {compiling}")
    advise(notes, strategy, completions)


def count_written(engine: Engine, completions: Sequence[Completion]) -> None:
    """Counts the tokens, if a draft vocabulary may be chosen by them later."""
    strategy = engine.strategy
    if isinstance(strategy, Adaptive) and strategy.exits and strategy.vocabulary is None:
        ids = (token for one in completions for token in one.token_ids)
        with suppress(OSError):  # a cache that can't be written
            add_written(cache_directory(), engine.tokenizer, ids)


def stream_one(
    engine: Engine, request: Request, ids: list[int], people: Console, show_drafts: bool
) -> Completion:
    """Streams one text to the terminal."""
    people.print(verbatim(request.prompt), style="dim")
    colours = Colours(engine.tokenizer, ids) if show_drafts else None
    return stream(people, engine.watch(dataclasses.replace(request, prompt=ids)), colours)


def generate_all(
    engine: Engine,
    requests: Sequence[Request],
    encoded: Sequence[list[int]],
    people: Console | None,
    notes: Console,
    show_drafts: bool,
    finish: Callable[[str, Completion], None],
) -> None:
    """Prints texts in prompt order, with a progress bar if `notes` is a terminal. If decoding is
    interrupted, texts that wait for earlier ones are printed at the end."""
    asked = [
        dataclasses.replace(request, prompt=ids)
        for request, ids in zip(requests, encoded, strict=True)
    ]

    waiting: dict[int, Completion] = {}
    shown = 0

    def show(index: int) -> None:
        completion = waiting.pop(index)
        finish(requests[index].prompt, completion)
        if people is None:
            return
        people.print(verbatim(requests[index].prompt), style="dim")
        if show_drafts:
            people.print(coloured(engine.tokenizer, encoded[index], completion))
        else:
            people.print(verbatim(completion.text + "\n"))

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("decoding", total=len(asked))

        def ended(index: int, completion: Completion) -> None:
            nonlocal shown
            waiting[index] = completion
            while shown in waiting:
                show(shown)
                shown += 1
            progress.advance(task)

        try:
            engine.generate(asked, on_completion=ended)
        finally:
            for index in sorted(waiting):
                show(index)


def json_lines(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Opens the output for JSON lines, if there is one. An existing file is emptied."""
    if path is None or path == as_path("-"):
        return nullcontext(sys.stdout if path else None)
    return path.open("w", encoding="utf-8")


def advise(notes: Console, strategy: Strategy, completions: Sequence[Completion]) -> None:
    """Prints a hint if few drafts were accepted."""
    drafted = sum(c.drafted for c in completions)
    accepted = sum(c.accepted for c in completions)
    if strategy.exit_layer and drafted and accepted < 0.3 * drafted:
        notes.print(
            f"Few drafts of exit {strategy.exit_layer} were accepted. Early-exit drafts slow down "
            "models that were not trained with LayerSkip, though the text stays the same."
        )


if __name__ == "__main__":
    sys.exit(main())
