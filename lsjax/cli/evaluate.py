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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.evaluation_table import show
from lsjax.cli.loading import load_shown
from lsjax.cli.setup import choose_dtype, keep_compiled_programs
from lsjax.cli.strategies import StrategyName, choose_strategies, in_one_program
from lsjax.config import ConfigError, DataConfig, MeshConfig, check
from lsjax.config.run_path import split_step
from lsjax.data.chat import chat_prompt
from lsjax.data.documents import Document
from lsjax.data.token_store import encode_document
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request, check_settings, encode_prompt
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answering import Question, answer_all, key_of
from lsjax.evaluation.answers import Answer
from lsjax.evaluation.results import append, resume
from lsjax.evaluation.summary import WHOLE, summarise
from lsjax.evaluation.tasks.all_tasks import TASKS
from lsjax.evaluation.tasks.examples import (
    choose_shots,
    file_rows,
    make_examples,
    prompts_of,
    templates,
    tfds_rows,
)
from lsjax.evaluation.tasks.task import Example, Row, Task
from lsjax.model.checkpoint import open_source
from lsjax.model.fingerprint import fingerprints
from lsjax.model.llama import Llama
from lsjax.model.run_directory import is_run, read_config
from lsjax.sharding import make_mesh


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A task at several exits and with several strategies."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run (RUN@200, RUN@best)."""
    task: Literal[tuple(TASKS)]  # type: ignore[valid-type]
    """What is asked."""
    output: Path
    """A line of JSON an answer (.jsonl); the summary goes beside it, as .summary.json. If it holds
    answers to the same questions, the rest is done."""
    data: tuple[str, ...] = ()
    """Files of rows or patterns: .jsonl, .tsv, .csv, each also as .gz. By default the task's
    TensorFlow data set."""
    tfds_split: str | None = None
    """Another split of that."""
    tfds_data_dir: str = ""
    """Where TensorFlow data sets lie; empty is TFDS's own, ~/tensorflow_datasets."""
    offset: int = 0
    """Leaves out the first so many examples."""
    limit: int | None = None
    """At most so many examples."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that can't be asked; either way it is named."""
    prompt_template: str | None = None
    """The prompt of a row, its fields in braces. By default that of the run, if the model is one
    that was finetuned on rows with these fields, else the task's."""
    response_template: str | None = None
    """The response to compare with, likewise."""
    num_shots: int | None = None
    """Examples with their responses before each prompt; the task's own number by default."""
    shots_data: tuple[str, ...] = ()
    """Files that the shots are drawn from."""
    without_seen: tuple[str, ...] = ()
    """Files of training rows: figures also for the examples whose prompt is not among them."""
    groups: bool = False
    """Shows each category of the examples too; the summary has them in any case."""
    strategies: tuple[StrategyName, ...] = ("autoregressive",)
    """One or several, in turns."""
    exit_layers: tuple[int, ...] = ()
    """Each is tried with early_exit and self_speculative. Self-speculation alone may take it from
    the model's generation_config.json."""
    num_draft_tokens: int | None = None
    """Tokens drafted in a round (from the model, if it says so)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only (lsjax.cli.count_tokens)."""
    max_new_tokens: int | None = None
    """Ends a text that does not end by itself; the task's own number by default."""
    temperature: float = 0.0
    """0 is greedy. Above 0 tokens are drawn, with logits divided by this."""
    top_k: int = 0
    """Draws from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draws from the fewest tokens whose probabilities sum up to p."""
    min_p: float = 0.0
    """Draws from tokens at least min_p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that were there before, and multiplies those below."""
    no_repeat_ngram: int = 0
    """Says no n-gram of this size twice; 0 allows all."""
    num_samples: int = 1
    """Texts for each example; a score is the mean over them."""
    seed: int = 0
    """Of the choice of shots, and of the first sampled text; each further one has the next."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text where it would contain this, beside what the task says; may be given several
    times."""
    allow_code_execution: bool = False
    """Runs the texts of human_eval against its tests, with limits that guard against accidents; it
    is no security boundary (docs/evaluation.md)."""
    chat: bool = False
    """Puts prompts into the model's chat template."""
    system: str | None = None
    """With --chat: the system message."""
    batch_size: int = 1
    """Texts decoded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    stack_layers: bool = False
    """Runs the layers in a loop, as decode.py --stack-layers does."""
    max_length: int | None = None
    """Of prompt and new tokens together; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to run on; one by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    with one_line_errors():
        evaluate(arguments)
    return 0


def evaluate(arguments: Arguments) -> None:
    """Answers what is not answered yet, prints the table and writes the summary."""
    check_numbers(arguments)
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False, style="dim")
    task = with_options(TASKS[arguments.task], arguments)
    source, tokenizer = open_source(arguments.model), load_tokenizer(arguments.model)
    strategies = choose_strategies(
        arguments.model,
        tokenizer,
        arguments.strategies,
        arguments.exit_layers,
        arguments.num_draft_tokens,
        arguments.draft_vocab,
        flag="--strategies",
    )
    mesh = None if arguments.mesh == MeshConfig() else make_mesh(arguments.mesh)
    for strategy in strategies:
        check_settings(
            source.config,
            tokenizer,
            strategy,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            data_axis=1 if mesh is None else mesh.shape["data"],
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
    task.score("", examples[0])  # whether that can be done here, before the work

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    model = load_shown(source, notes, dtype=dtype, stack_layers=arguments.stack_layers, mesh=mesh)
    asked = what_is_asked(arguments, task, data, strategies, questions, model, dtype, mesh)
    answers = resume(arguments.output, asked)
    total = len(questions) * len(strategies)
    if answers:
        notes.print(f"{arguments.output} has {len(answers)} of {total} answers")
    engine = Engine(
        model,
        tokenizer,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        min_capacity=max(len(one.request.prompt) for one in questions) + task.max_new_tokens,
        mesh=mesh,
    )
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(task.name, total=total, completed=len(answers))

        def keep(answer: dict[str, Any]) -> None:
            append(arguments.output, answer)
            answers.append(answer)
            progress.advance(bar)

        done = {key_of(answer) for answer in answers}
        answer_all(engine, task, in_one_program(strategies), questions, done, keep)
    names = [str(Answer.by(strategy)) for strategy in strategies]
    answers.sort(key=lambda answer: names.index(answer["strategy"]))
    rows = summarise(answers)
    summary = {"asked": asked, "bad_rows": problems.found, "figures": rows}
    summary_file(arguments.output).write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shown = [row for row in rows if arguments.groups or row["group"] in WHOLE]
    show(f"{arguments.model.name}, {dtype}, {task.name}", shown)


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


def check_numbers(arguments: Arguments) -> None:
    """Raises ConfigError for numbers that cannot work, and for those that mean nothing."""
    for name, low in (("offset", 0), ("limit", 1), ("num_shots", 0), ("num_samples", 1)):
        value = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        check(value is None or value >= low, f"{flag} {value} is below {low}: choose {low} up")
    check(
        arguments.output.suffix == ".jsonl",
        f"--output {arguments.output} is no .jsonl: it gets a line of JSON an answer",
    )
    check(arguments.chat or arguments.system is None, "--system needs --chat: give both or none")
    if arguments.temperature == 0:
        for name, plain in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("num_samples", 1)):
            check(
                getattr(arguments, name) == plain,
                f"--{name.replace('_', '-')} means nothing to greedy decoding: choose a "
                "--temperature above 0",
            )


def with_options(task: Task, arguments: Arguments) -> Task:
    """The task with the numbers and stop strings that the arguments give."""
    changes = {
        name: value
        for name in ("max_new_tokens", "num_shots", "prompt_template", "response_template")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.allow_code_execution:
        check(
            task.score_by_running is not None,
            f"--allow-code-execution means nothing to {task.name}, whose texts are no programs",
        )
        changes["score"] = task.score_by_running
    return dataclasses.replace(task, stop=task.stop + arguments.stop, **changes)


def read_examples(
    task: Task,
    arguments: Arguments,
    encode: Callable[[str, DataConfig], list[int]],
    problems: Problems,
) -> tuple[list[Example], DataConfig]:
    """The examples that are asked for, and the templates that made them."""
    rows = open_rows(task, arguments, problems)
    first = next(rows, None)
    check(first is not None, "the data have no rows: name other ones")
    data = choose_templates(task, arguments, first[2])
    seen = frozenset(prompts_of(task, data, file_rows(arguments.without_seen)))
    count, shots = task.num_shots, ""
    if count:
        shots = choose_shots(task, data, shot_rows(task, arguments), count, arguments.seed)
    examples = make_examples(
        task,
        data,
        chain([first], rows),
        shots=shots,
        seen=seen,
        accept=lambda example: encode(example.prompt, data) and None,
        refuse=problems,
    )
    last = None if arguments.limit is None else arguments.offset + arguments.limit
    chosen = list(islice(examples, arguments.offset, last))
    check(
        bool(chosen),
        f"the data have no examples behind the first {arguments.offset}: choose a smaller --offset",
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


def choose_templates(task: Task, arguments: Arguments, row: Row) -> DataConfig:
    """Those of the arguments, of the run, or of the task."""
    directory, _ = split_step(arguments.model)
    trained = None
    if arguments.prompt_template is None and arguments.response_template is None:
        trained = read_config(directory).data if is_run(directory) else None
    return templates(task, trained, row)


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


def what_is_asked(
    arguments: Arguments,
    task: Task,
    data: DataConfig,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    model: Llama,
    dtype: str,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """All that the answers depend on: they are only continued where it is the same."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(model))}
    content = [
        (one.example.id, one.request.prompt, one.example.reference, one.example.seen)
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
        "task": task.name,
        "model": arguments.model.name,
        "weights": digest(sorted(fingerprints(leaves).items())),
        "dtype": dtype,
        "devices": [device.device_kind for device in devices],
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
