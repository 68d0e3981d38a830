"""Compares strategies on the same prompts: speed, share of the ideal speedup, and exactness.

    python -m lsjax.cli.benchmark --model PATH --exit-layers 4 8 --num-draft-tokens 4 8
    python -m lsjax.cli.benchmark --model PATH --identity-tail 2 --exit-layers 2 4 8 15 \\
        --num-draft-tokens 2 4 8 12 --draft-vocab 2048
    python -m lsjax.cli.benchmark --model PATH --task spec_bench --data question.jsonl --groups \\
        --exit-layers 8 --num-draft-tokens 4 --repeats 1 --output benchmarks/model

After a warm-up, autoregressive decoding and every exit with every draft length take turns in one
process. docs/performance.md defines the columns. Greedy texts are compared with autoregressive
decoding. Exit code 1: in float32 they differ by more than rounding explains.

The directory --output gets answers.jsonl (a line per text, from which a killed run resumes),
cells.jsonl (the table), and benchmark.png if there are several cells.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rich.console import Console

from lsjax.cli import answering, flags
from lsjax.cli.answering import TaskFlags
from lsjax.cli.flags import OpenModel, StrategyFlags, StrategyName, load_engine, make_strategies
from lsjax.cli.prompts import prompt_rows
from lsjax.cli.setup import check_output, program
from lsjax.cli.show import notes_console, show_cells, show_verdict
from lsjax.config import ConfigError, LlamaConfig, Path, bounded, check
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import in_one_program
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.answers import ALL, Answer, Question
from lsjax.evaluation.comparison import cell_speeds, identity_tail, timed_lines
from lsjax.evaluation.examples import Task
from lsjax.evaluation.plots import plot_grid
from lsjax.evaluation.tasks import TASKS, first_turn

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
    score=lambda text, example: {},
    change=first_turn,
    group="category",
    needs_reference=False,
)


@dataclass(frozen=True, kw_only=True)
class Arguments(TaskFlags, StrategyFlags):
    """Compares strategies on the same prompts."""

    strategies: tuple[StrategyName, ...] = ("self_speculative",)
    """Strategies to compare with autoregressive decoding, at every exit."""
    prompt: str | None = None
    """Text to continue; by default, three built-in prompts."""
    prompt_file: Path | None = None
    """File of prompts. A .txt file is one prompt. A .jsonl file has "prompt" (or Spec-Bench's
    "turns") on each line. With --prompt-template, other rows, .tsv and .csv work too; also .gz."""
    task: Literal[tuple(TASKS)] | None = None  # type: ignore[valid-type]
    """Prompts of a task (docs/evaluation.md)."""
    new_tokens: int = bounded(64, low=2)
    """New tokens per prompt; end-of-text tokens are ignored."""
    repeats: int = bounded(5, low=1)
    """Number of runs of each strategy with each prompt."""
    identity_tail: int | None = None
    """Layers from this one on add nothing. Drafts of this or a later exit are all accepted.
    The draft vocabulary is chosen from the model's own output."""
    output: Path | None = None
    """Directory for answers, table and plot; by default, nothing is written."""


def benchmark(arguments: Arguments) -> int:
    """Makes the missing measurements, and prints, writes and plots the table.

    Returns 1 if texts are not exact.
    """
    notes = notes_console()
    model = flags.open_model(arguments)
    config, tail = model.source.config, arguments.identity_tail
    check_numbers(arguments, config)
    questions = make_questions(arguments, model, notes)
    strategies = choose_strategies(arguments, model, None if tail is None else {})
    output, file = arguments.output, None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        file = output / "answers.jsonl"
        check_output(file, arguments.prompt_file)
    engine = load_engine(
        model,
        notes,
        change=lambda model: model if tail is None else identity_tail(model, tail),
        ignore_end=True,
    )
    if tail is not None and arguments.draft_vocab is not None:
        said = engine.generate([one.request for one in questions if one.sample == 0])
        counts = Counter(token for one in said for token in one.token_ids)
        strategies = choose_strategies(arguments, model, counts)

    more = {name: getattr(arguments, name) for name in ("identity_tail", "new_tokens")}
    asked = answering.conditions(model, engine, strategies, **more)
    line = timed_lines(engine, strategies[0])
    rest = (engine, strategies, questions, line, notes)
    answers = answering.complete(file, asked, *rest, turn=1, timed=True)
    rows = list(cell_speeds(config, strategies, answers))
    title = describe(arguments, engine, questions)
    show_cells(title, [row for row in rows if arguments.groups or row["group"] == ALL])
    print(f"{len(engine.programs)} programs, {engine.programs.compile_seconds:.1f} s compiling")
    if output is not None:
        write(output, title, rows, notes)
    return show_verdict(answers, str(engine.model.dtype))


def check_numbers(arguments: Arguments, config: LlamaConfig) -> None:
    """Raises ConfigError for numbers out of range and for flags without effect."""
    check(arguments.batch_size == 1, "--batch-size must be 1 here: texts are timed one by one")
    flags.check_sampling(arguments.sampling, 1)
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
    arguments: Arguments, model: OpenModel, counts: Mapping[int, int] | None
) -> list[Strategy]:
    """Autoregressive decoding, then each cell of the grid, cells with the full head first.

    counts: token counts for the draft vocabulary; by default those stored for the model.
    """
    own = arguments.strategies
    names = ("autoregressive", *(own if arguments.exit_layers or "auto" in own else ()))
    found: list[Strategy] = []
    for size in dict.fromkeys((None, arguments.draft_vocab)):
        asked = replace(arguments, strategies=names, draft_vocab=size)
        found += make_strategies(asked, model, counts)
    return in_one_program(list(dict.fromkeys(found)))


def make_questions(arguments: Arguments, model: OpenModel, notes: Console) -> list[Question]:
    """Every prompt in each repeat. A text has the same seed under every strategy."""
    task, rows = TASKS.get(arguments.task, OWN_PROMPTS), None
    if task is OWN_PROMPTS:
        texts = PROMPTS if arguments.prompt is None else (arguments.prompt,)
        rows = partial(prompt_rows, texts, arguments.prompt_file)
    task = replace(task, max_new_tokens=arguments.new_tokens)
    examples, *_ = answering.read_examples(task, arguments, model, notes, rows)
    questions = answering.make_questions(
        examples, arguments.repeats, arguments.sampling, max_new_tokens=arguments.new_tokens
    )
    return sorted(questions, key=lambda question: question.sample)


def describe(arguments: Arguments, engine: Engine, questions: Sequence[Question]) -> str:
    """The title of the table."""
    lengths = [len(one.request.prompt) for one in questions if one.sample == 0]
    repeats, temperature = arguments.repeats, arguments.sampling.temperature
    parts = [
        f"{arguments.model.name}, {engine.model.dtype}",
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens",
        f"{arguments.new_tokens} new tokens, {repeats} repeat{'s' * (repeats > 1)}",
    ]
    parts += [f"temperature {temperature:g}"] if temperature else []
    if arguments.identity_tail is not None:
        parts.append(f"identity tail from layer {arguments.identity_tail} on")
    return ", ".join(parts)


def write(output: Path, title: str, rows: Sequence[Answer], notes: Console) -> None:
    """Writes the table as JSON lines, with null for infinity, and plots a grid."""
    with (output / "cells.jsonl").open("w", encoding="utf-8") as lines:
        for row in rows:
            values = {k: None if v == math.inf else v for k, v in row.items()}
            print(json.dumps(values), file=lines)
    whole = [row for row in rows if row["group"] == ALL and row["num_draft_tokens"] is not None]
    if len({(row["exit_layer"], row["num_draft_tokens"]) for row in whole}) > 1:
        try:
            plot_grid(whole, output / "benchmark.png", title=title)
        except ConfigError as error:
            notes.print(f"no plot: {error}")


main = program(Arguments, benchmark, __doc__)

if __name__ == "__main__":
    sys.exit(main())
