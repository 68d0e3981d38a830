"""Tasks, and their examples from rows of files or of a TensorFlow data set."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.files import Fields, PlacedRow, Refuse, stop_at
from lsjax.data.pieces import Document
from lsjax.data.sources import row_document, tfds_split

SHOT_ROWS = 10_000  # rows that shots are drawn from


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task.

    id: unique in the data. prompt: text, shots included. ids: tokens of the prompt. reference: text
    to compare with, or empty. group: category. seen: whether the given training rows have the same
    prompt. fields: fields of the row.
    """

    id: str
    prompt: str = ""
    ids: Sequence[int] = ()
    reference: str = ""
    group: str = ""
    seen: bool = False
    fields: Fields = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    prompt_template, response_template: as in DataConfig, with the names of a row's fields.
    score: figures of a text, each from 0 to 1, the main one first; some examples may have none.
    score_by_running: like `score`, but runs the text as a program.
    max_new_tokens, num_shots, stop: defaults, which flags override.
    shot_response: changes the response of a shot. between_shots: text after each shot.
    after_shots: text after all shots.
    tfds: name of the TensorFlow data set, which has the splits test and train (for shots).
    change: changes a row before the templates read it. Raises ConfigError, whose message continues
    the row's location.
    id: field with a row's id; by default, the row's location. group: field with its category.
    """

    name: str
    prompt_template: str
    response_template: str
    score: Callable[[str, Example], dict[str, float]]
    score_by_running: Callable[[str, Example], dict[str, float]] | None = None
    max_new_tokens: int = 512
    num_shots: int = 0
    shot_response: Callable[[str], str] = str
    between_shots: str = "\n"
    after_shots: str = ""
    stop: tuple[str, ...] = ()
    tfds: str | None = None
    change: Callable[[Fields], Fields] = dict
    id: str | None = None
    group: str | None = None
    needs_reference: bool = True


def tfds_rows(name: str, split: str, data_dir: str) -> Iterator[PlacedRow]:
    """The rows of a TensorFlow data set."""
    title, _, rows = tfds_split(name, split, data_dir)
    for number in range(len(rows)):
        yield f"{split}:{number}", f"{title}, row {number}", rows[number]


def read_row(task: Task, data: DataConfig, placed: PlacedRow) -> tuple[Fields, Document]:
    """The row after the task's `change`, and the document that the templates make from it.

    Raises ConfigError, which begins with the row's location.
    """
    _, where, row = placed
    try:
        row = task.change(row)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None
    return row, row_document(row, data, where)


def templates(task: Task, trained: DataConfig | None, rows: Iterable[PlacedRow] = ()) -> DataConfig:
    """The templates of training, if the model was finetuned on rows with these fields, else the
    task's.

    trained: the run's data configuration, if the model is a run. rows: some rows of the task; the
    first that fits either template decides.
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
                read_row(task, data, row)
                return data
    return own


def make_examples(
    task: Task,
    data: DataConfig,
    rows: Iterable[PlacedRow],
    *,
    shots: Sequence[Document] = (),
    seen: frozenset[str] = frozenset(),
    encode: Callable[[str], Sequence[int]] = lambda prompt: (),
    refuse: Refuse = stop_at,
) -> Iterator[Example]:
    """The examples of a task, one per valid row.

    data: the templates. shots: precede each prompt. seen: prompts of training rows. encode: returns
    a prompt's ids, or raises ConfigError for a prompt that the model can't take.

    `refuse` is called with the error of each bad row. If it returns, the row is skipped.
    """
    before = before_prompts(task, shots)
    for placed in rows:
        name, where, _ = placed
        try:
            fields, own = read_row(task, data, placed)
            check(
                bool(own.text.strip()) or not task.needs_reference,
                f"{where} has an empty response: add a text to compare with",
            )
            check(own not in shots, f"{where} is one of the shots: draw them from other rows")
            prompt = before + own.prompt
            try:
                ids = encode(prompt)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        except ConfigError as error:
            refuse(error)
            continue
        yield Example(
            id=str(fields.get(task.id, name)),
            prompt=prompt,
            ids=ids,
            reference=own.text,
            group=str(fields.get(task.group, "")),
            seen=own.prompt.strip() in seen,
            fields=fields,
        )


def prompts_of(task: Task, data: DataConfig, rows: Iterable[PlacedRow]) -> frozenset[str]:
    """The prompts of rows, without shots, as `make_examples` compares them."""
    return frozenset(read_row(task, data, row)[1].prompt.strip() for row in rows)


def choose_shots(
    task: Task, data: DataConfig, rows: Iterable[PlacedRow], count: int, seed: int
) -> tuple[Document, ...]:
    """`count` rows, drawn by the seed from the first SHOT_ROWS.

    Raises ConfigError if there are fewer.
    """
    documents = [read_row(task, data, row)[1] for row in islice(rows, SHOT_ROWS)]
    check(
        len(documents) >= count,
        f"{count} shots are requested, but there are {len(documents)} rows for them: lower "
        "--num-shots",
    )
    return tuple(random.Random(seed).sample(documents, count))


def before_prompts(task: Task, shots: Sequence[Document]) -> str:
    """The shots as text, which precedes every prompt."""
    parts = (f"{one.prompt}{task.shot_response(one.text)}{task.between_shots}" for one in shots)
    return "".join(parts) + task.after_shots if shots else ""
