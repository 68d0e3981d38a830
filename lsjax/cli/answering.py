"""Questions made from a task's examples, and the file that collects their answers."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice, product, tee
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints.run import is_run, read_run_config
from lsjax.checkpoints.steps import fingerprints
from lsjax.cli.flags import ChatFlags, ModelFlags, OpenModel, SamplingFlags
from lsjax.config import ConfigError, DataConfig, Path, bounded, check, split_step
from lsjax.data.chat import Dialogue
from lsjax.data.files import Lines, PlacedRow, Refuse, file_rows, stop_at
from lsjax.data.pieces import Document
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.answers import (
    Answer,
    Question,
    as_line,
    decode_in_turns,
    digest,
    key_of,
    resume,
)
from lsjax.evaluation.comparison import warm_up
from lsjax.evaluation.examples import (
    Example,
    Task,
    choose_shots,
    make_examples,
    prompts_of,
    templates,
    tfds_rows,
)
from lsjax.sharding import machine

LOOKED_AT = 100  # rows that are tried when templates are chosen
VERSION = 6  # of the file's header and lines


@dataclass(frozen=True, kw_only=True)
class TaskFlags(ChatFlags, ModelFlags):
    """Examples of a task, and how they become prompts."""

    data: tuple[str, ...] = ()
    """Files of rows, or patterns: .jsonl, .tsv, .csv, each also as .gz. Default: the task's
    TensorFlow data set."""
    tfds_data_dir: str = ""
    """Directory of TensorFlow data sets; empty means TFDS's default, ~/tensorflow_datasets."""
    offset: int = bounded(0, low=0)
    """Number of examples to skip at the start."""
    limit: int | None = bounded(None, low=1)
    """Maximum number of examples."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Whether to stop at a row that is invalid or too long, or to report and skip it."""
    prompt_template: str | None = None
    """Prompt of a row, with its fields in braces: '{question}'. Default: the template that the run
    was finetuned with, if its fields fit, or else the task's."""
    response_template: str | None = None
    """Response to compare with, written like --prompt-template."""
    num_shots: int | None = bounded(None, low=0)
    """Solved examples before each prompt; the task's own number by default."""
    shots_data: tuple[str, ...] = ()
    """Files to draw the shots from, with --seed."""
    without_seen: tuple[str, ...] = ()
    """Files of training rows. Adds figures for the examples whose prompts are not in them."""
    sampling: SamplingFlags = GREEDY
    groups: bool = False
    """Also prints each category of examples. Files always contain them."""


def read_examples(
    task: Task,
    flags: TaskFlags,
    model: OpenModel,
    notes: Console,
    own_rows: Callable[[Refuse], Iterator[PlacedRow]] | None = None,
) -> tuple[list[Example], DataConfig, list[str]]:
    """The requested examples, their templates, and the errors of skipped rows.

    Prompts are tokenised as in training, or with the chat template. own_rows: returns rows that are
    not training data and fit the task's templates; by default, the rows of the flags.
    """
    skipped: list[str] = []

    def refuse(error: ConfigError) -> None:
        if flags.bad_rows == "refuse":
            raise error
        skipped.append(str(error))
        notes.print(f"skipped: {error}", soft_wrap=True)

    names = ("num_shots", "prompt_template", "response_template")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    task = dataclasses.replace(task, **given)
    (directory, _), trained = split_step(flags.model), None
    if own_rows is None and not {*names[1:]} & given.keys() and is_run(directory):
        trained = read_run_config(directory).data
    found = own_rows(refuse) if own_rows else _rows(task, flags, flags.data, "test", refuse)
    rows, looked_at = tee(found)
    data = templates(task, trained, islice(looked_at, LOOKED_AT))

    def encode(prompt: str) -> list[int]:
        tokenizer = model.tokenizer
        if flags.chat:
            _, ids = Dialogue(tokenizer, flags.system).prompt(prompt)
        elif own_rows is not None:
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.encode(prompt, allow_special=data.allow_special)
        request = Request(prompt=ids, max_new_tokens=task.max_new_tokens)
        return encode_prompt(request, tokenizer, model.source.config, flags.max_length)

    shots: tuple[Document, ...] = ()
    if task.num_shots:
        check(
            bool(flags.shots_data) or (not flags.data and task.tfds is not None),
            f"{task.num_shots} shots need rows that are not evaluated: name their files with "
            "--shots-data, or choose --num-shots 0",
        )
        drawn = _rows(task, flags, flags.shots_data, "train")
        shots = choose_shots(task, data, drawn, task.num_shots, flags.sampling.seed)
    seen = prompts_of(task, data, file_rows(flags.without_seen))
    made = make_examples(task, data, rows, shots=shots, seen=seen, encode=encode, refuse=refuse)
    examples = list(islice(islice(made, flags.offset, None), flags.limit))
    after = f" after the first {flags.offset}" if flags.offset else ""
    check(bool(examples), f"the data have no examples{after}: use other data or a lower --offset")
    ((id_, times),) = Counter(example.id for example in examples).most_common(1)
    check(
        times == 1,
        f"two rows have the id {id_}, which must be unique: correct the ids, or evaluate one "
        "file at a time",
    )
    return examples, data, skipped


def _rows(
    task: Task, flags: TaskFlags, files: Sequence[str], split: str, refuse: Refuse = stop_at
) -> Iterator[PlacedRow]:
    """Rows of the files, or without files a split of the task's TensorFlow data set."""
    if files:
        return file_rows(files, refuse)
    check(task.tfds is not None, f"{task.name} has no TensorFlow data set: name files with --data")
    return tfds_rows(task.tfds, split, flags.tfds_data_dir)


def make_questions(
    examples: Sequence[Example], num_samples: int, sampling: Sampling, **request: Any
) -> list[Question]:
    """One question per sample of each example. Question number i has the seed + i.

    request: other fields of `Request`.
    """
    questions = []
    for number, (example, sample) in enumerate(product(examples, range(num_samples))):
        own = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)
        asked = Request(prompt=example.ids, sampling=own, **request)
        questions.append(Question(example, sample, asked))
    return questions


def complete(
    file: Path | None,
    asked: dict[str, Any],
    engine: Engine,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    line: Callable[[Question, Completion], Answer],
    notes: Console,
    *,
    turn: int,
    timed: bool = False,
) -> list[Answer]:
    """The answers to all questions by all strategies. Missing answers are added to the file.

    asked: the conditions. line: turns a finished text into an answer. turn: as in
    `decode_in_turns`. timed: warms up every program, and reruns the first strategy as a baseline
    for missing answers.
    """
    known = {} if file is None else resume(file, asked)
    wanted = [question.key(strategy) for strategy in strategies for question in questions]
    found = {key: known[key] for key in wanted if key in known}
    if found:
        notes.print(f"{len(found)} of {len(wanted)} answers are already stored")
    if timed and len(found) < len(wanted):
        warm_up(engine, strategies, questions)
    with (
        nullcontext() if file is None else closing(Lines(file)) as lines,
        Progress(console=notes, transient=True) as progress,
    ):
        bar = progress.add_task("decoding", total=len(wanted), completed=len(found))

        def ended(question: Question, completion: Completion) -> None:
            answer = line(question, completion)
            if lines is not None:
                lines.write(as_line(answer))
            found[key_of(answer)] = answer
            progress.update(bar, completed=len(found))

        decode_in_turns(
            engine, strategies, questions, set(found), ended, turn=turn, beside_first=timed
        )
    return [found[key] for key in wanted]


def conditions(
    model: OpenModel, engine: Engine, strategies: Sequence[Strategy], **more: Any
) -> dict[str, Any]:
    """Everything that answers depend on, except strategy, document and sample. A file of answers is
    resumed only under the same conditions."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(engine.model))}
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    vocabularies = {one.draft_vocab: one.vocabulary for one in drafting if one.vocabulary}
    # A draft that ends early is verified with the shortest length that fits.
    lengths = {n for one in drafting if one.draft_confidence is not None for n in one.lengths}
    devices = jax.devices()[:1] if engine.mesh is None else engine.mesh.devices.flat
    return {
        "version": VERSION,
        "model": model.flags.model.name,
        "weights": digest(sorted(fingerprints(leaves).items())),
        "tokenizer": digest([engine.tokenizer.fingerprint, engine.tokenizer.eos_ids]),
        "dtype": str(engine.model.dtype),
        "devices": [device.device_kind for device in devices],
        "machine": machine(),
        "jax": jax.__version__,
        "draft_vocab": digest([one.ids_N.tolist() for one in vocabularies.values()]),
        "lengths": sorted(lengths),
        "sampling": dataclasses.asdict(model.flags.sampling),
        **more,
    }
