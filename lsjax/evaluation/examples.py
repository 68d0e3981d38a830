"""From the rows of files or of a TensorFlow data set to the examples of a task."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.documents import Document, find_files, stop_at
from lsjax.data.sources import (
    Fields,
    Refuse,
    comma_separated_rows,
    json_rows,
    row_document,
    tab_separated_rows,
)
from lsjax.evaluation.tasks import Example, Task

# By the end of a file's name, behind which .gz may stand.
READERS = {".jsonl": json_rows, ".tsv": tab_separated_rows, ".csv": comma_separated_rows}
SHOT_ROWS = 10_000  # of which shots are drawn

PlacedRow = tuple[str, str, Fields]  # a short name, where it stands in words, and its fields


def file_rows(paths: Sequence[str], refuse: Refuse = stop_at) -> Iterator[PlacedRow]:
    """The rows of files: .jsonl, .tsv or .csv, each also as .gz.

    Raises ConfigError for a missing file and for one of another kind. `refuse` is called with the
    error of each bad row, which is left out if it returns.
    """
    for file in find_files(paths):
        kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        check(
            kind in READERS,
            f"{file}: rows come from {', '.join(READERS)}, not from {kind or 'that'}",
        )
        for number, row in READERS[kind](file, refuse):
            yield f"{file.name}:{number}", f"{file}, line {number}", row


def tfds_rows(name: str, split: str, data_dir: str) -> Iterator[PlacedRow]:
    """The rows of a TensorFlow data set."""
    # Only here: its import takes a second.
    from lsjax.data.tfds_rows import TfdsRows

    for number, (where, row) in enumerate(TfdsRows(name, split, data_dir).rows()):
        yield f"{split}:{number}", where, row


def templates(task: Task, trained: DataConfig | None, rows: Iterable[PlacedRow] = ()) -> DataConfig:
    """The templates of training, if the model was finetuned on rows with these fields, else the
    task's.

    trained: the data of the run, if the model is one. rows: some of the task's; the first one that
    fits either decides.
    """
    own = DataConfig(
        source="jsonl",
        paths=(task.name,),
        prompt_template=task.prompt_template,
        response_template=task.response_template,
    )
    if trained is None or not trained.has_prompts:
        return own
    for _, _, row in rows:
        for data in (trained, own):
            with suppress(ConfigError):
                row_document(task.change(row), data, "")
                return data
    return own


def make_examples(
    task: Task,
    data: DataConfig,
    rows: Iterable[PlacedRow],
    *,
    shots: Sequence[Document] = (),
    seen: frozenset[str] = frozenset(),
    accept: Callable[[Example], None] = lambda example: None,
    refuse: Refuse = stop_at,
) -> Iterator[Example]:
    """The examples of a task, one of each good row.

    data: the templates. shots: stand before each prompt. seen: prompts of training rows. accept:
    may raise ConfigError for an example that the model can't be asked.

    `refuse` is called with the error of each bad row, which is left out if it returns.
    """
    before = before_prompts(task, shots)
    for name, where, row in rows:
        try:
            fields = changed(task, where, row)
            own = row_document(fields, data, where)
            check(
                bool(own.text.strip()) or not task.needs_reference,
                f"{where} has an empty response: there is nothing to compare with",
            )
            check(own not in shots, f"{where} is one of the shots: draw them from other rows")
            example = Example(
                id=str(fields.get(task.id, name)),
                prompt=before + own.prompt,
                reference=own.text,
                group=str(fields.get(task.group, "")),
                seen=own.prompt.strip() in seen,
                fields=fields,
            )
            try:
                accept(example)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        except ConfigError as error:
            refuse(error)
            continue
        yield example


def changed(task: Task, where: str, row: Fields) -> Fields:
    """The row as the templates read it. Raises ConfigError with where it stands."""
    try:
        return task.change(row)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def prompts_of(task: Task, data: DataConfig, rows: Iterable[PlacedRow]) -> frozenset[str]:
    """The prompts of rows, without shots, as `make_examples` compares them."""
    documents = (row_document(changed(task, where, row), data, where) for _, where, row in rows)
    return frozenset(document.prompt.strip() for document in documents)


def choose_shots(
    task: Task, data: DataConfig, rows: Iterable[PlacedRow], count: int, seed: int
) -> tuple[Document, ...]:
    """`count` rows, drawn by the seed from the first SHOT_ROWS.

    Raises ConfigError where there are fewer.
    """
    some = islice(rows, SHOT_ROWS)
    documents = [row_document(changed(task, where, row), data, where) for _, where, row in some]
    check(
        len(documents) >= count,
        f"{count} shots are asked for, but there are {len(documents)} rows for them: lower "
        "--num-shots",
    )
    return tuple(random.Random(seed).sample(documents, count))


def before_prompts(task: Task, shots: Sequence[Document]) -> str:
    """The text before every prompt: the shots."""
    parts = (f"{one.prompt}{task.shot_response(one.text)}{task.between_shots}" for one in shots)
    return "".join(parts) + task.after_shots if shots else ""
