"""Compares strategies on the same prompts: speed, share of the ideal speedup, and exactness."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.console import Console

from lsjax.cli import engines
from lsjax.cli.evaluate import read_questions
from lsjax.cli.flags.benchmark import Arguments
from lsjax.cli.notes import notes_console
from lsjax.cli.prompts import prompt_rows
from lsjax.cli.setup import bar, check_output
from lsjax.cli.show import show_cells, show_costs, show_verdict
from lsjax.config import AnyPath, ConfigError, LlamaConfig, as_path, check
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation import answers, comparison, speed_plots, speeds
from lsjax.evaluation.many_rows import RoundCost, time_rounds
from lsjax.evaluation.scores import ALL, Answer
from lsjax.evaluation.tasks import TASKS, Task, first_turn
from lsjax.interrupts import keeps
from lsjax.io.files import writing
from lsjax.io.lines import Lines

PROMPTS = (
    "Once upon a time, there was a little girl named Lily who",
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It",
    "Photosynthesis is the process by which plants",
)
# How rows with prompts become examples; other rows need --prompt-template.
OWN_PROMPTS = Task(
    name="prompts",
    prompt_template="{prompt}",
    response_template=" ",
    allow_special=True,
    change=first_turn,
    group="category",
    needs_reference=False,
)


def benchmark(arguments: Arguments) -> int:
    """Makes the missing measurements, and prints, writes and plots the table. Returns 1 if texts
    are not exact."""
    notes, model = notes_console(), engines.open_model(arguments)
    config, tail = model.source.config, arguments.identity_tail
    check_numbers(arguments, config)
    if arguments.rows:
        return many_rows(arguments, model, notes)
    task, rows = TASKS.get(arguments.task, OWN_PROMPTS), None
    if task is OWN_PROMPTS:
        texts = PROMPTS if arguments.prompt is None else (arguments.prompt,)
        rows = partial(prompt_rows, texts, arguments.prompt_file)
    task = replace(task, max_new_tokens=arguments.new_tokens, stop=())
    # A text has the same seed under every strategy.
    questions, *_ = read_questions(task, arguments, model, notes, arguments.repeats, rows)
    questions.sort(key=lambda question: question.sample)
    strategies = choose_strategies(arguments, model, None if tail is None else {})
    output, file = arguments.output, as_path(os.devnull)
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        file = output / "answers.jsonl"
        check_output(file, arguments.prompt_file)
        keeps("the same command adds the missing answers")
    change = {} if tail is None else {"change": partial(comparison.identity_tail, exit_layer=tail)}
    engine = engines.load_engine(model, notes, ignore_end=True, **change)
    if tail is not None and arguments.draft_vocab is not None:
        said = engine.generate([one.request for one in questions if one.sample == 0])
        counts = Counter(token for one in said for token in one.token_ids)
        strategies = choose_strategies(arguments, model, counts)
    more = {name: getattr(arguments, name) for name in ("identity_tail", "new_tokens")}
    asked = answers.conditions(engine, arguments.model.name, arguments.sampling, **more)
    figures = partial(speeds.timed_beside, engine)
    rest = (engine, strategies, questions, asked, file, notes, figures)
    found = answers.complete(*rest, timed=True)
    rows = list(speeds.cell_speeds(config, found))
    lengths = [len(one.request.prompt) for one in questions]
    repeats, temperature = arguments.repeats, arguments.sampling.temperature
    title = f"{arguments.model.name}, {engine.model.dtype}, {len(lengths) // repeats} prompts of "
    title += f"{min(lengths)} to {max(lengths)} tokens, {arguments.new_tokens} new tokens, "
    title += f"{repeats} repeat{'s' * (repeats > 1)}"
    title += f", temperature {temperature:g}" if temperature else ""
    title += "" if tail is None else f", identity tail from layer {tail} on"
    show_cells(title, [row for row in rows if arguments.groups or row["group"] == ALL])
    print(f"{len(engine.programs)} programs, {engine.programs.compile_seconds:.1f} s compiling")
    if output is not None:
        write(output, title, rows, notes)
    return show_verdict(found, str(engine.model.dtype))


def many_rows(arguments: Arguments, model: engines.OpenModel, notes: Console) -> int:
    """Times rounds of --rows, and prints, writes and plots what they cost and gain."""
    strategies, output = engines.make_strategies(arguments, model), arguments.output
    check(
        all(isinstance(one, SelfSpeculative) for one in strategies),
        "--rows needs --exit-layers and --num-draft-tokens, such as 8 and 1 2 4: it times "
        "self_speculative",
    )
    shards = arguments.mesh.data
    for rows in arguments.rows:
        check(
            rows == 1 or rows % shards == 0,
            f"--rows {rows} is not a multiple of --mesh.data {shards}: choose such multiples",
        )
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        check_output(output / "rows.jsonl")
    engine = engines.load_engine(model, notes)
    runtime, length = engine.runtime, 2 * arguments.new_tokens
    capacity = max(runtime.capacity(length, one) for one in strategies)
    costs: list[RoundCost] = []
    for rows in bar(notes, "timing rounds")(arguments.rows):
        costs += time_rounds(runtime, strategies, rows, capacity, arguments.repeats)
    title = f"{arguments.model.name}, {engine.model.dtype}, {capacity // 2} tokens in the cache, "
    title += f"{arguments.repeats} repeat{'s' * (arguments.repeats > 1)}"
    show_costs(title, costs)
    if output is not None:
        with closing(Lines(output / "rows.jsonl", empty=True)) as lines:
            for cost in costs:
                lines.write(answers.as_line(asdict(cost)))
        by_name = {arguments.model.name: costs}
        plot(notes, speed_plots.plot_rows, by_name, output / "rows.png", title)
    return 0


def check_numbers(arguments: Arguments, config: LlamaConfig) -> None:
    """Raises ConfigError for numbers out of range and for flags without effect."""
    check(arguments.batch_size == 1, "--batch-size must be 1 here: texts are timed one by one")
    engines.check_sampling(arguments.sampling, 1)
    last, tail = config.num_layers - 1, arguments.identity_tail
    check(
        tail is None or 1 <= tail <= last,
        f"--identity-tail {tail} is out of range: use a layer in 1..{last}",
    )
    given = [n for n in ("prompt", "prompt_file", "task") if getattr(arguments, n) is not None]
    names = " and ".join(map(arguments.name_of, given))
    check(len(given) < 2, f"{names} are given: choose one source of prompts")
    check(
        arguments.task is not None or not arguments.data,
        "--data needs --task: add it, or name the file with --prompt-file",
    )


def choose_strategies(
    arguments: Arguments, model: engines.OpenModel, counts: Mapping[int, int] | None
) -> list[Strategy]:
    """Autoregressive decoding, then each cell of the grid, cells with the full head first. `auto`
    is one cell: it chooses its own vocabulary.

    counts: token counts for the draft vocabulary; by default those stored for the model.
    """
    own = arguments.strategies
    names = ("autoregressive", *(own if arguments.exit_layers or "auto" in own else ()))
    found: list[Strategy] = []
    for size in dict.fromkeys((None, arguments.draft_vocab)):
        fitting = tuple(name for name in names if name != "auto" or size is None)
        asked = replace(arguments, strategies=fitting, draft_vocab=size)
        found += engines.make_strategies(asked, model, counts)
    return list(dict.fromkeys(found))


def write(output: AnyPath, title: str, rows: Sequence[Answer], notes: Console) -> None:
    """Writes the table as JSON lines, with null for infinity, and plots a grid."""
    with closing(Lines(output / "cells.jsonl", empty=True)) as lines:
        for row in rows:
            lines.write(answers.as_line({k: None if v == math.inf else v for k, v in row.items()}))
    whole = [row for row in rows if row["group"] == ALL]
    if len(whole) > 1:
        titles = [title, *filter(None, [speeds.doubts(rows)])]
        plot(notes, speed_plots.plot_speeds, whole, output / "benchmark.png", "\n".join(titles))


def plot(
    notes: Console, draw: Callable[..., None], figures: Any, file: AnyPath, title: str
) -> None:
    """Draws a picture and names it. If matplotlib is missing, prints a note instead."""
    try:
        draw(figures, file, title=title)
        notes.print(f"picture: {file}")
    except ConfigError as error:
        notes.print(f"no plot: {error}")
