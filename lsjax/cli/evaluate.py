"""Answers a task at several exits and with several strategies, and scores the answers.

    python -m lsjax.cli.evaluate --model RUN --task topv2 --data topv2/test.tsv --limit 1000 \\
        --strategies autoregressive early_exit self_speculative --exit-layers 8 15 23 \\
        --num-draft-tokens 4 --without-seen topv2/train.tsv --output topv2.jsonl

The same command after a kill goes on where it was. docs/evaluation.md says what the tasks and the
figures are.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from lsjax.checkpoints import fingerprints, open_checkpoint
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.evaluation_examples import Problems, ask, prompt_ids, read_examples
from lsjax.cli.evaluation_options import Arguments, check_numbers, with_options
from lsjax.cli.evaluation_table import show
from lsjax.cli.flags import parse_flags
from lsjax.cli.loading import load_shown
from lsjax.cli.setup import choose_dtype, keep_compiled_programs, machine
from lsjax.cli.strategies import choose_strategies, fitting_mesh, in_one_program
from lsjax.config import DataConfig, check
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import encode_prompt
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answering import Question, answer_all, key_of
from lsjax.evaluation.answers import Answer
from lsjax.evaluation.results import append, resume
from lsjax.evaluation.summary import WHOLE, summarise
from lsjax.evaluation.tasks.all_tasks import TASKS
from lsjax.evaluation.tasks.task import Task
from lsjax.model.llama import Llama


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        evaluate(parse_flags(Arguments, argv, __doc__))
    return 0


def evaluate(arguments: Arguments) -> None:
    """Answers what is not answered yet, prints the table and writes the summary."""
    check_numbers(arguments)
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False, style="dim")
    task = with_options(TASKS[arguments.task], arguments)
    source = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(arguments.model).fitted(source.config.vocab_size)
    strategies = choose_strategies(
        arguments.model,
        tokenizer,
        arguments.strategies,
        arguments.exit_layers,
        arguments.num_draft_tokens,
        arguments.draft_vocab,
        arguments.draft_confidence,
        flag="--strategies",
    )
    mesh = fitting_mesh(
        arguments.mesh,
        strategies,
        source.config,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    problems = Problems(arguments.bad_rows, notes)

    def encode(prompt: str, data: DataConfig) -> list[int]:
        return encode_prompt(
            prompt_ids(prompt, data, tokenizer, arguments),
            tokenizer,
            source.config,
            max_new_tokens=task.max_new_tokens,
            max_length=arguments.max_length,
        )

    examples, data = read_examples(task, arguments, encode, problems)
    questions = ask(examples, [encode(one.prompt, data) for one in examples], task, arguments)
    check_output(arguments.output)
    for example in {one.group: one for one in examples}.values():
        task.score("", example)  # whether that can be done here, before the work

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    model = load_shown(source, notes, dtype=dtype, stack_layers=arguments.stack_layers, mesh=mesh)
    asked = what_is_asked(
        arguments, task, data, strategies, questions, model, tokenizer, dtype, mesh
    )
    answers = resume(arguments.output, asked)
    check(
        len({key_of(answer) for answer in answers}) == len(answers),
        f"{arguments.output} holds an answer twice, as if two programs had written it: name "
        "another --output, or remove it",
    )
    notes.print(f"prompts are like {data.prompt_template!r}, responses {data.response_template!r}")
    if answers:
        notes.print(f"{arguments.output} has {len(answers)} answers already")
    engine = Engine(
        model,
        tokenizer,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        min_capacity=max(len(one.request.prompt) for one in questions) + task.max_new_tokens,
        mesh=mesh,
    )
    answers += answer_shown(engine, task, strategies, questions, answers, arguments.output)
    names = [str(Answer.by(strategy)) for strategy in strategies]
    answers.sort(key=lambda answer: names.index(answer["strategy"]))
    rows = summarise(answers, source.config)
    summary = {"asked": asked, "bad_rows": problems.found, "figures": rows}
    summary_file(arguments.output).write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shown = [row for row in rows if arguments.groups or row["group"] in WHOLE]
    show(f"{arguments.model.name}, {dtype}, {task.name}", shown)


def answer_shown(
    engine: Engine,
    task: Task,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    output: Path,
) -> list[dict[str, Any]]:
    """What is missing in the answers so far, written to the output one by one, with a bar."""
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    found: list[dict[str, Any]] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = len(questions) * len(strategies)
        bar = progress.add_task(task.name, total=total, completed=len(answers))

        def keep(answer: dict[str, Any]) -> None:
            append(output, answer)
            found.append(answer)
            progress.advance(bar)

        done = {key_of(answer) for answer in answers}
        answer_all(engine, task, in_one_program(strategies), questions, done, keep)
    return found


def what_is_asked(
    arguments: Arguments,
    task: Task,
    data: DataConfig,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    model: Llama,
    tokenizer: Tokenizer,
    dtype: str,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """All that the answers and their times depend on: they are only continued where it is the
    same."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(model))}
    content = [
        (one.request.prompt, one.example.seen, repr(sorted(one.example.row.items())))
        for one in questions
    ]
    sampling = dataclasses.asdict(questions[0].request.sampling)
    vocabularies = {
        strategy.draft_vocab: strategy.vocabulary.ids_N.tolist()
        for strategy in strategies
        if isinstance(strategy, SelfSpeculative) and strategy.vocabulary is not None
    }
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    return {
        "version": 3,
        "task": task.name,
        "model": arguments.model.name,
        "weights": digest(sorted(fingerprints(leaves).items())),
        "tokenizer": digest([tokenizer.fingerprint, tokenizer.eos_ids]),
        "dtype": dtype,
        "devices": [device.device_kind for device in devices],
        "machine": machine(),
        "jax": jax.__version__,
        "questions": len(questions),
        "examples": digest(content),
        "prompt_template": data.prompt_template,
        "response_template": data.response_template,
        "num_shots": task.num_shots,
        "chat": arguments.chat,
        "system": arguments.system,
        "allow_code_execution": arguments.allow_code_execution,
        "strategies": [str(Answer.by(strategy)) for strategy in strategies],
        "draft_vocab": digest([*vocabularies.values()]) if vocabularies else None,
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        "num_samples": arguments.num_samples,
        "sampling": sampling
        if sampling["temperature"]
        else {"temperature": 0.0} | repeats(sampling),
        "batch_size": arguments.batch_size,
        "stack_layers": arguments.stack_layers,
    }


def repeats(sampling: dict[str, Any]) -> dict[str, Any]:
    """What greedy decoding depends on too."""
    return {name: sampling[name] for name in ("repetition_penalty", "no_repeat_ngram")}


def digest(content: Any) -> str:
    """Hash (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def summary_file(output: Path) -> Path:
    """Where the summary of a file of results goes."""
    return output.with_suffix(".summary.json")


if __name__ == "__main__":
    sys.exit(main())
