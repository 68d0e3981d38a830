"""Answers a task at several exits and with several strategies, and scores the answers."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product, tee
from typing import Any

from rich.console import Console

from lsjax.checkpoints.run import is_run, read_run_config
from lsjax.cli import engines
from lsjax.cli.flags.evaluate import Arguments, TaskFlags
from lsjax.cli.notes import notes_console
from lsjax.cli.setup import check_output
from lsjax.cli.show import or_dash, table, wide_console
from lsjax.config import ConfigError, check, split_step
from lsjax.data.chat import Dialogue
from lsjax.data.sources import tfds_split
from lsjax.decoding.request import Request, encode_prompt
from lsjax.evaluation import answers
from lsjax.evaluation.scores import ALL, UNSEEN, summarise
from lsjax.evaluation.tasks import TASKS, Task, as_trained, choose_shots, make_questions
from lsjax.interrupts import keeps
from lsjax.io.files import write_json
from lsjax.io.rows import PlacedRow, Refuse, file_rows, stop_at

LOOKED_AT = 100  # rows that are tried when templates are chosen


def evaluate(arguments: Arguments) -> None:
    """Makes the missing answers, prints the table and writes the summary."""
    output, sampling, notes = arguments.output, arguments.sampling, notes_console()
    check(output.suffix == ".jsonl", f"--output {output} is not a .jsonl file: name one")
    engines.check_sampling(sampling, arguments.num_samples)
    task, by_running = TASKS[arguments.task], arguments.allow_code_execution
    check(
        task.score_by_running is not None or not by_running,
        f"--allow-code-execution has no effect on {task.name}: leave it out",
    )
    score = task.score_by_running if by_running else task.score
    length = arguments.max_new_tokens or task.max_new_tokens
    task = replace(task, max_new_tokens=length, stop=task.stop + arguments.stop)
    model = engines.open_model(arguments)
    strategies = engines.make_strategies(arguments, model)
    questions, task, bad_rows = read_questions(task, arguments, model, notes, arguments.num_samples)
    check_output(output)
    for question in {one.group: one for one in questions}.values():
        score("", question)  # fails before the work if scoring is impossible
    longest = max(len(one.request.prompt) for one in questions)
    engine = engines.load_engine(model, notes, min_length=longest + length)
    names = ("prompt_template", "response_template", "max_new_tokens", "stop")
    more = {"task": task.name} | {name: getattr(task, name) for name in names}
    more |= {"batch_size": arguments.batch_size, "allow_code_execution": by_running}
    asked = answers.conditions(engine, arguments.model.name, sampling, **more)
    keeps("the same command adds the missing answers")
    found = answers.complete(
        *(engine, strategies, questions, asked, output, notes),
        lambda question, done, _: {"scores": score(done.text, question)},
    )
    rows = summarise(found)
    summary = {"asked": asked, "bad_rows": bad_rows, "figures": rows}
    write_json(output.with_suffix(".summary.json"), summary)
    shown = [row for row in rows if arguments.groups or row["group"] in (ALL, UNSEEN)]
    show(f"{arguments.model.name}, {engine.model.dtype}, {task.name}", shown)


def read_questions(
    task: Task,
    chosen: TaskFlags,
    model: engines.OpenModel,
    notes: Console,
    num_samples: int,
    own_rows: Callable[[Refuse], Iterator[PlacedRow]] | None = None,
) -> tuple[list[answers.Question], Task, list[str]]:
    """The samples of the chosen examples, the task with its templates, and errors of skipped rows.

    Prompts are tokenised as in training, or with the chat template. Question number i has the
    seed + i. own_rows: returns rows that are not training data and fit the task's templates; by
    default, the rows of the flags.
    """
    skipped: list[str] = []

    def refuse(error: ConfigError) -> None:
        if chosen.bad_rows == "refuse":
            raise error
        skipped.append(str(error))
        notes.print(f"skipped: {error}", soft_wrap=True)

    names = ("num_shots", "prompt_template", "response_template")
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    task = replace(task, **given)
    found = own_rows(refuse) if own_rows else rows_of(task, chosen, chosen.data, "test", refuse)
    rows, looked_at = tee(found)
    directory, _ = split_step(chosen.model)
    if own_rows is None and not {*names[1:]} & given.keys() and is_run(directory):
        trained = read_run_config(directory).data
        task = as_trained(task, trained, islice(looked_at, LOOKED_AT))

    def encode(prompt: str) -> list[int]:
        tokenizer = model.tokenizer
        if chosen.chat:
            _, ids = Dialogue(tokenizer, chosen.system).prompt(prompt)
        else:
            ids = tokenizer.encode(prompt, allow_special=task.allow_special)
        request = Request(prompt=ids, max_new_tokens=task.max_new_tokens)
        return encode_prompt(request, tokenizer, model.source.config, chosen.max_length)

    shots, seen = shots_of(task, chosen), file_rows(chosen.without_seen)
    made = make_questions(task, rows, shots=shots, seen=seen, encode=encode, refuse=refuse)
    examples = list(islice(islice(made, chosen.offset, None), chosen.limit))
    after = f" after the first {chosen.offset}" if chosen.offset else ""
    check(bool(examples), f"the data have no examples{after}: use other data or a lower --offset")
    ((id_, times),) = Counter(example.id for example in examples).most_common(1)
    check(
        times == 1,
        f"two rows have the id {id_}, which must be unique: correct the ids, or evaluate one "
        "file at a time",
    )
    questions = []
    for number, (example, sample) in enumerate(product(examples, range(num_samples))):
        request = replace(example.request, sampling=chosen.sampling.of_text(number))
        questions.append(replace(example, request=request, sample=sample))
    return questions, task, skipped


def shots_of(task: Task, chosen: TaskFlags) -> Sequence[str]:
    """Worked examples to show before each question. Raises ConfigError if they have no source."""
    if not task.num_shots:
        return ()
    check(
        bool(chosen.shots_data) or (not chosen.data and task.tfds is not None),
        f"{task.num_shots} shots need rows that are not evaluated: name their files with "
        "--shots-data, or choose --num-shots 0",
    )
    drawn = rows_of(task, chosen, chosen.shots_data, "train")
    return choose_shots(task, drawn, task.num_shots, chosen.sampling.seed)


def rows_of(
    task: Task, chosen: TaskFlags, files: Sequence[str], split: str, refuse: Refuse = stop_at
) -> Iterator[PlacedRow]:
    """Rows of the files, or without files a split of the task's TensorFlow data set."""
    if files:
        yield from file_rows(files, refuse)
        return
    check(task.tfds is not None, f"{task.name} has no TensorFlow data set: name files with --data")
    title, _, rows = tfds_split(task.tfds, split, chosen.tfds_data_dir)
    for number in range(len(rows)):
        yield f"{split}:{number}", f"{title}, row {number}", rows[number]


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each strategy and group of examples."""
    scores = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    figures = {"equal": ("equal", ".3f"), "accepted": ("acceptance_rate", ".3f")}
    figures |= {"tokens/round": ("tokens_per_round", ".2f")}
    lines = []
    for row in rows:
        strategy = row["strategy"] if row["group"] == ALL else ""
        line = [strategy, row["group"], str(row["examples"])]
        for one in map(row["scores"].get, scores):
            line.append(f"{one['mean']:.4g} ± {or_dash(one['stderr'], '.2g')}" if one else "-")
        lines.append(line + [or_dash(row[name], form) for name, form in figures.values()])
    names = ["strategy", "examples of", "n", *scores, *figures]
    wide_console().print(table(title, names, lines, left=2))
