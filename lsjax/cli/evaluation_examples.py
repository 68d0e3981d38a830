"""The examples that lsjax.cli.evaluate is asked for, and what the model is asked about each."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from rich.console import Console

from lsjax.checkpoints import is_run, read_run_config
from lsjax.cli.evaluation_options import Arguments
from lsjax.config import ConfigError, DataConfig, check, split_step
from lsjax.data.chat import chat_prompt
from lsjax.data.documents import Document
from lsjax.data.token_store import encode_document
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.evaluation.answering import Question
from lsjax.evaluation.tasks.examples import (
    choose_shots,
    file_rows,
    make_examples,
    prompts_of,
    templates,
    tfds_rows,
)
from lsjax.evaluation.tasks.task import Example, Row, Task

LOOKED_AT = 100  # rows that tell whether they are of the kind that the model was finetuned on


class Problems:
    """Bad rows: the first one ends the program, or each is named and left out."""

    def __init__(self, bad_rows: str, notes: Console):
        self.found: list[str] = []
        self._skip, self._notes = bad_rows == "skip", notes

    def __call__(self, error: ConfigError) -> None:
        if not self._skip:
            raise error
        self.found.append(str(error))
        self._notes.print(f"skipped: {error}", soft_wrap=True)


def read_examples(
    task: Task,
    arguments: Arguments,
    encode: Callable[[str, DataConfig], list[int]],
    problems: Problems,
) -> tuple[list[Example], DataConfig]:
    """The examples that are asked for, and the templates that made them."""
    rows = open_rows(task, arguments, problems)
    first: list[tuple[str, str, Row]] = []

    def looked_at() -> Iterator[Row]:
        for row in islice(rows, LOOKED_AT):
            first.append(row)
            yield row[-1]

    data = choose_templates(task, arguments, looked_at())
    seen = frozenset(prompts_of(task, data, file_rows(arguments.without_seen)))
    count, shots = task.num_shots, ()
    if count:
        shots = choose_shots(task, data, shot_rows(task, arguments), count, arguments.seed)
    examples = make_examples(
        task,
        data,
        chain(first, rows),
        shots=shots,
        seen=seen,
        accept=lambda example: encode(example.prompt, data) and None,
        refuse=problems,
    )
    last = None if arguments.limit is None else arguments.offset + arguments.limit
    chosen = list(islice(examples, arguments.offset, last))
    check(
        bool(chosen),
        f"the data have no examples behind the first {arguments.offset}: choose a smaller --offset"
        if arguments.offset
        else "the data have no examples: name other ones",
    )
    by_id: dict[str, Example] = {}
    for example in chosen:
        check(
            by_id.setdefault(example.id, example) is example,
            f"two rows have the id {example.id}: an answer would have no place of its own; "
            "evaluate one file at a time",
        )
    return chosen, data


def open_rows(task: Task, arguments: Arguments, problems: Problems) -> Iterator:
    """The rows that the arguments name: files, or the task's TensorFlow data set."""
    if arguments.data:
        check(arguments.tfds_split is None, "--tfds-split means nothing to --data")
        return file_rows(arguments.data, problems)
    check(
        task.tfds is not None,
        f"{task.name} is no TensorFlow data set: name its files by --data",
    )
    name, split, _ = task.tfds
    return tfds_rows(name, arguments.tfds_split or split, arguments.tfds_data_dir)


def shot_rows(task: Task, arguments: Arguments) -> Iterator:
    """The rows that shots are drawn from."""
    if arguments.shots_data:
        return file_rows(arguments.shots_data)
    check(
        not arguments.data and task.tfds is not None,
        f"{task.num_shots} shots need rows that are not asked: name their files by --shots-data, "
        "or choose --num-shots 0",
    )
    name, _, split = task.tfds
    return tfds_rows(name, split, arguments.tfds_data_dir)


def choose_templates(task: Task, arguments: Arguments, rows: Iterable[Row]) -> DataConfig:
    """Those of the arguments, of the run, or of the task."""
    directory, _ = split_step(arguments.model)
    trained = None
    if arguments.prompt_template is None and arguments.response_template is None:
        trained = read_run_config(directory).data if is_run(directory) else None
    return templates(task, trained, rows)


def prompt_ids(
    prompt: str, data: DataConfig, tokenizer: Tokenizer, arguments: Arguments
) -> list[int]:
    """Token ids of a prompt, as in training, or in the chat template if asked for."""
    if arguments.chat:
        text = chat_prompt(tokenizer, prompt, arguments.system)
        return tokenizer.encode(text, add_bos=False)
    ids, count = encode_document(Document("", prompt), data, tokenizer)
    return ids[:count]


def ask(
    examples: Sequence[Example], ids: Sequence[list[int]], task: Task, arguments: Arguments
) -> list[Question]:
    """A question for each sample of each example; text number i of all has the seed + i."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    return [
        Question(
            example,
            sample,
            Request(
                prompt=prompt,
                max_new_tokens=task.max_new_tokens,
                stop=task.stop,
                sampling=dataclasses.replace(
                    sampling, seed=sampling.seed + number * arguments.num_samples + sample
                ),
            ),
        )
        for number, (example, prompt) in enumerate(zip(examples, ids, strict=True))
        for sample in range(arguments.num_samples)
    ]
