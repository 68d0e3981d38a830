"""From the rows of files or of a TensorFlow data set to the examples of a task."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.documents import Document, find_files, stop_at
from lsjax.data.sources import (
    comma_separated_rows,
    json_rows,
    row_document,
    tab_separated_rows,
)
from lsjax.evaluation.tasks.task import Example, Row, Task

# By the end of a file's name, behind which .gz may stand.
READERS = {".jsonl": json_rows, ".tsv": tab_separated_rows, ".csv": comma_separated_rows}

SHOT_ROWS = 10_000

Refuse = Callable[[ConfigError], None]


def file_rows(paths: Sequence[str], refuse: Refuse = stop_at) -> Iterator[tuple[str, str, Row]]:
    """Of each row of the files: a short name, where it stands, and its fields.

    Raises ConfigError for a missing file, one of another kind, and a bad row, unless `refuse`,
    which is called with each bad row's error, returns.
    """
    for file in find_files(paths):
        kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        check(
            kind in READERS,
            f"{file}: rows come from {', '.join(READERS)}, not from {kind or 'that'}",
        )
        for number, row in READERS[kind](file, refuse):
            yield f"{file.name}:{number}", f"{file}, line {number}", row


def tfds_rows(name: str, split: str, data_dir: str) -> Iterator[tuple[str, str, Row]]:
    """The same of a TensorFlow data set."""
    # Only here: its import takes a second.
    from lsjax.data.tfds_rows import TfdsRows

    for number, (where, row) in enumerate(TfdsRows(name, split, data_dir).rows()):
        yield f"{split}:{number}", where, row


def templates(task: Task, trained: DataConfig | None, rows: Iterable[Row] = ()) -> DataConfig:
    """How prompts and responses are made: as they were for training, if the model was finetuned on
    rows with these fields, else as the task says.

    trained: the data of the run, if the model is one. rows: some of the task's; the first that
    either can be made of decides.
    """
    own = DataConfig(
        source="jsonl",
        paths=(task.name,),
        prompt_template=task.prompt_template,
        response_template=task.response_template,
    )
    if trained is None or not trained.has_prompts:
        return own
    for row in rows:
        for data in (trained, own):
            with suppress(ConfigError):
                row_document(task.fields(row), data, "")
                return data
    return own


def make_examples(
    task: Task,
    data: DataConfig,
    rows: Iterable[tuple[str, str, Row]],
    *,
    shots: Sequence[Document] = (),
    seen: frozenset[str] = frozenset(),
    accept: Callable[[Example], None] = lambda example: None,
    refuse: Refuse = stop_at,
) -> Iterator[Example]:
    """The examples of a task, one of each good row.

    data: the templates. shots: stand before each prompt. seen: prompts of training rows. accept:
    may raise ConfigError for an example that the model can't be asked.

    Raises ConfigError, with where the row stands, for a bad one, or calls `refuse` with it.
    """
    for name, where, row in rows:
        try:
            example = _example(task, data, name, where, row, shots, seen)
            try:
                accept(example)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        except ConfigError as error:
            refuse(error)
            continue
        yield example


def prompts_of(task: Task, data: DataConfig, rows: Iterable[tuple[str, str, Row]]) -> set[str]:
    """The prompts of rows, without shots, as `make_examples` compares them."""
    return {document(task, data, where, row).prompt.strip() for _, where, row in rows}


def choose_shots(
    task: Task,
    data: DataConfig,
    rows: Iterable[tuple[str, str, Row]],
    count: int,
    seed: int,
) -> tuple[Document, ...]:
    """`count` rows, drawn by the seed from the first SHOT_ROWS.

    Raises ConfigError where there are fewer.
    """
    some = islice(rows, SHOT_ROWS)
    documents = [document(task, data, where, row) for _, where, row in some]
    check(
        len(documents) >= count,
        f"{count} shots are asked for, but there are {len(documents)} rows for them: lower "
        "--num-shots",
    )
    return tuple(random.Random(seed).sample(documents, count))


def before_prompts(task: Task, shots: Sequence[Document]) -> str:
    """What stands before every prompt."""
    parts = (f"{one.prompt}{task.shot_response(one.text)}{task.between_shots}" for one in shots)
    return "".join(parts) + task.after_shots if shots else ""


def document(task: Task, data: DataConfig, where: str, row: Row) -> Document:
    """Prompt and response of a row. Raises ConfigError, with where the row stands."""
    return row_document(_fields(task, where, row), data, where)


def _fields(task: Task, where: str, row: Row) -> Row:
    try:
        return task.fields(row)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def _example(
    task: Task,
    data: DataConfig,
    name: str,
    where: str,
    row: Row,
    shots: Sequence[Document],
    seen: frozenset[str],
) -> Example:
    fields = _fields(task, where, row)
    own = row_document(fields, data, where)
    check(
        bool(own.text.strip()) or not task.needs_reference,
        f"{where} has an empty response: there is nothing to compare with",
    )
    check(own not in shots, f"{where} is one of the shots: draw them from other rows")
    return Example(
        id=str(fields.get(task.id, name)) if task.id else name,
        prompt=before_prompts(task, shots) + own.prompt,
        reference=own.text,
        group=str(fields.get(task.group, "")) if task.group else "",
        seen=own.prompt.strip() in seen,
        row=fields,
    )
