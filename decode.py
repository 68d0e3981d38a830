"""Continues prompts with a Llama: autoregressively, from an early exit, or self-speculatively.

    python decode.py --model PATH --prompt "Once upon a time"
    python decode.py --model PATH --prompt-file prompts.jsonl --strategy self_speculative \\
        --exit-layer 8 --num-draft-tokens 4 --json results.jsonl
    python decode.py --model PATH --interactive
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import open_checkpoint
from lsjax.cli.chat import chat
from lsjax.cli.decoding_options import (
    Arguments,
    check_together,
    choose_requests,
    choose_strategy,
    prompt_ids,
)
from lsjax.cli.errors import check_output, ended_by_sigterm, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.loading import load_shown
from lsjax.cli.prompts import encode_prompts
from lsjax.cli.setup import choose_dtype, keep_compiled_programs
from lsjax.cli.show import LEGEND, Colours, coloured, stream, summary, verbatim
from lsjax.config import MeshConfig
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request, check_settings, check_stop_ids, encode_prompt
from lsjax.decoding.state import Strategy
from lsjax.sharding import make_mesh

Show = Callable[[int, Completion], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors(), ended_by_sigterm():
        decode(parse_flags(Arguments, argv, __doc__))
    return 0


def decode(arguments: Arguments) -> None:
    """Loads, decodes, shows.

    Raises ConfigError, CheckpointError, TokenizerError or OSError with one line for bad input.
    """
    check_together(arguments)
    to_stdout = arguments.json == Path("-")
    requests = choose_requests(arguments)
    source = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(arguments.model).fitted(source.config.vocab_size)
    strategy = choose_strategy(arguments, tokenizer)
    max_length = arguments.max_length
    mesh = None if arguments.mesh == MeshConfig() else make_mesh(arguments.mesh)
    data_axis = 1 if mesh is None else mesh.shape["data"]
    needed = -(-max(len(requests), 1) // data_axis) * data_axis
    batch_size = min(arguments.batch_size, needed)
    check_settings(
        source.config,
        strategy,
        batch_size=batch_size,
        max_length=max_length,
        data_axis=data_axis,
    )

    def encode(request: Request) -> list[int]:
        check_stop_ids(request, source.config)
        ids = prompt_ids(tokenizer, request.prompt, arguments)
        limits = dict(max_new_tokens=request.max_new_tokens, max_length=max_length)
        return encode_prompt(ids, tokenizer, source.config, **limits)

    encoded = encode_prompts(requests, encode)
    if arguments.json is not None and not to_stdout:
        check_output(arguments.json, arguments.prompt_file)

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    plain = partial(Console, highlight=False, markup=False, emoji=False, soft_wrap=True)
    people, notes = plain(stderr=to_stdout), plain(stderr=True, style="dim")

    engine = Engine(
        load_shown(source, notes, dtype=dtype, stack_layers=arguments.stack_layers, mesh=mesh),
        tokenizer,
        strategy,
        batch_size=batch_size,
        max_length=max_length,
        mesh=mesh,
    )
    totals = [
        len(ids) + request.max_new_tokens for request, ids in zip(requests, encoded, strict=True)
    ]
    weights, cache = engine.memory_bytes(max(totals, default=arguments.max_new_tokens))
    notes.print(
        f"{arguments.model.name}: {source.config.num_params / 1e6:.0f}M parameters, "
        f"{weights / 1e6:.0f} MB in {dtype}; cache {cache / 1e6:.0f} MB for {engine.batch_size} "
        f"row{'s' * (engine.batch_size > 1)}"
    )

    completions: list[Completion] = []
    with json_lines(arguments.json) as lines:

        def finish(prompt: str, completion: Completion) -> None:
            completion = dataclasses.replace(completion, prompt=prompt)
            completions.append(completion)
            if lines:
                print(json.dumps(completion.to_json(), ensure_ascii=False), file=lines, flush=True)

        if arguments.interactive:
            chat(
                engine,
                requests[0],
                people,
                notes,
                system=arguments.system,
                show_drafts=arguments.show_drafts,
                finish=finish,
            )
            return
        prompts = [request.prompt for request in requests]
        asked = [
            dataclasses.replace(request, prompt=ids)
            for request, ids in zip(requests, encoded, strict=True)
        ]
        if len(asked) == 1 and not to_stdout:
            if arguments.show_drafts:
                people.print(LEGEND)
            people.print(verbatim(prompts[0]), style="dim")
            colours = Colours(tokenizer, encoded[0]) if arguments.show_drafts else None
            finish(prompts[0], stream(people, engine.watch(asked[0]), colours))
        else:
            if arguments.show_drafts:
                people.print(LEGEND)
            with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
                task = progress.add_task("decoding", total=len(asked))

                def show(index: int, completion: Completion) -> None:
                    finish(prompts[index], completion)
                    if to_stdout:
                        return
                    people.print(verbatim(prompts[index]), style="dim")
                    if arguments.show_drafts:
                        people.print(coloured(tokenizer, encoded[index], completion))
                    else:
                        people.print(verbatim(completion.text + "\n"))

                with in_order(show) as put:

                    def ended(index: int, completion: Completion) -> None:
                        put(index, completion)
                        progress.advance(task)

                    engine.generate(asked, on_completion=ended)
    notes.print(
        f"{summary(completions, engine.decode_seconds)}; {engine.compile_seconds:.1f} s compiling"
    )
    advise(notes, strategy, completions)


@contextmanager
def in_order(
    show: Callable[[int, Completion], None],
) -> Iterator[Callable[[int, Completion], None]]:
    """Texts end in any order; `show` gets them in that of the prompts. Where decoding is broken
    off, it gets at the end what has waited for another text."""
    waiting: dict[int, Completion] = {}
    shown = 0

    def put(index: int, completion: Completion) -> None:
        nonlocal shown
        waiting[index] = completion
        while shown in waiting:
            show(shown, waiting.pop(shown))
            shown += 1

    try:
        yield put
    finally:
        for index in sorted(waiting):
            show(index, waiting[index])


def json_lines(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Where the JSON lines go, if anywhere; a file that exists is emptied."""
    if path is None or path == Path("-"):
        return nullcontext(sys.stdout if path else None)
    return path.open("w", encoding="utf-8")


def advise(notes: Console, strategy: Strategy, completions: Sequence[Completion]) -> None:
    """Says why self-speculation did not pay, if it can't have."""
    drafted = sum(c.drafted for c in completions)
    accepted = sum(c.accepted for c in completions)
    if drafted and accepted < 0.3 * drafted:
        notes.print(
            f"Few drafts of exit {strategy.exit_layer} were right. A model that was not trained "
            "with LayerSkip decodes slower by early-exit drafts, though the text is the same."
        )


if __name__ == "__main__":
    sys.exit(main())
