"""Answers a task at several exits and with several strategies, and scores the answers.

    python -m lsjax.cli.evaluate --model RUN --task topv2 --data topv2/test.tsv --limit 1000 \\
        --strategies autoregressive early_exit self_speculative --exit-layers 8 15 23 \\
        --num-draft-tokens 4 --without-seen topv2/train.tsv --output topv2.jsonl

The same command resumes a killed run. docs/evaluation.md explains the tasks and the figures.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from lsjax.cli import answering, flags
from lsjax.cli.answering import TaskFlags
from lsjax.cli.flags import StrategyFlags, load_engine, make_strategies
from lsjax.cli.setup import check_output, program
from lsjax.cli.show import notes_console, or_dash, table, wide_console
from lsjax.config import Path, bounded, check
from lsjax.decoding.completion import Completion
from lsjax.decoding.self_speculative import in_one_program
from lsjax.evaluation.answers import (
    ALL,
    UNSEEN,
    Answer,
    Question,
    answer_line,
    summarise,
)
from lsjax.evaluation.examples import Task
from lsjax.evaluation.tasks import TASKS

TURN = 8  # questions per batch row before the next strategy takes its turn


@dataclass(frozen=True, kw_only=True)
class Arguments(TaskFlags, StrategyFlags):
    """Evaluates a task at several exits and with several strategies."""

    task: Literal[tuple(TASKS)]  # type: ignore[valid-type]
    """Task to evaluate (docs/evaluation.md)."""
    output: Path
    """File of answers, one JSON line each (.jsonl). The summary is written beside it, as
    .summary.json. If the file has answers from the same settings, only missing ones are added."""
    max_new_tokens: int | None = bounded(None, low=1)
    """Maximum number of new tokens; the task's own number by default."""
    num_samples: int = bounded(1, low=1)
    """Number of texts per example; scores are means over them."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text before this string, in addition to the task's strings; may be repeated."""
    allow_code_execution: bool = False
    """Runs the texts of human_eval against its tests. The limits guard against accidents; they are
    not a security boundary (docs/evaluation.md)."""


def evaluate(arguments: Arguments) -> None:
    """Makes the missing answers, prints the table and writes the summary."""
    output, sampling = arguments.output, arguments.sampling
    check(output.suffix == ".jsonl", f"--output {output} is not a .jsonl file: name one")
    flags.check_sampling(sampling, arguments.num_samples)
    notes, task = notes_console(), chosen_task(arguments)
    model = flags.open_model(arguments)
    strategies = make_strategies(arguments, model)
    examples, data, bad_rows = answering.read_examples(task, arguments, model, notes)
    check_output(output)
    for example in {one.group: one for one in examples}.values():
        task.score("", example)  # fails before the work if scoring is impossible
    request = dict(max_new_tokens=task.max_new_tokens, stop=task.stop)
    questions = answering.make_questions(examples, arguments.num_samples, sampling, **request)
    longest = max(len(example.ids) for example in examples)
    engine = load_engine(model, notes, min_capacity=longest + task.max_new_tokens)

    templates = {name: getattr(data, name) for name in ("prompt_template", "response_template")}
    asked = answering.conditions(
        *(model, engine, strategies),
        task=task.name,
        **templates,
        max_new_tokens=task.max_new_tokens,
        stop=list(task.stop),
        **{name: getattr(arguments, name) for name in ("batch_size", "allow_code_execution")},
    )

    def line(question: Question, completion: Completion) -> Answer:
        return answer_line(
            question, completion, scores=task.score(completion.text, question.example)
        )

    shared, turn = in_one_program(strategies), TURN * arguments.batch_size
    answers = answering.complete(output, asked, engine, shared, questions, line, notes, turn=turn)
    rows = summarise(answers)
    summary = {"asked": asked, "bad_rows": bad_rows, "figures": rows}
    output.with_suffix(".summary.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shown = [row for row in rows if arguments.groups or row["group"] in (ALL, UNSEEN)]
    show(f"{arguments.model.name}, {engine.model.dtype}, {task.name}", shown)


def chosen_task(arguments: Arguments) -> Task:
    """The task with length, stop strings and scores from the flags."""
    task, by_running = TASKS[arguments.task], arguments.allow_code_execution
    check(
        task.score_by_running is not None or not by_running,
        f"--allow-code-execution has no effect on {task.name}: leave it out",
    )
    return dataclasses.replace(
        task,
        max_new_tokens=arguments.max_new_tokens or task.max_new_tokens,
        stop=task.stop + arguments.stop,
        score=task.score_by_running if by_running else task.score,
    )


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each strategy and group of examples."""
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    figures = {"equal": ("equal", ".3f"), "accepted": ("acceptance_rate", ".3f")}
    figures |= {"tokens/round": ("tokens_per_round", ".2f")}
    lines, before = [], None
    for row in rows:
        cells = []
        for name in scores:
            score = row["scores"].get(name, {"mean": None, "stderr": None})
            cells += [or_dash(score["mean"], ".4g"), or_dash(score["stderr"], ".2g")]
        cells += [or_dash(row[name], form) for name, form in figures.values()]
        strategy = "" if row["strategy"] == before else row["strategy"]
        lines.append([strategy, row["group"], str(row["examples"]), *cells])
        before = row["strategy"]
    names = ["strategy", "examples of", "n", *(part for name in scores for part in (name, "±"))]
    wide_console().print(table(title, [*names, *figures], lines, left=2))


main = program(Arguments, evaluate, __doc__)

if __name__ == "__main__":
    sys.exit(main())
