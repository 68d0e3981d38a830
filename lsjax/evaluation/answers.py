"""Questions, and a file that collects their answers as strategies decode them.

Each line of the file is one answer, written when it is ready, so a killed run resumes. The first
line holds what all answers depend on, such as a hash of the weights. An answer's key is a hash of
all else that it depends on. An incomplete last line comes from a killed run.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints.steps import fingerprints
from lsjax.config import AnyPath, Sampling, check
from lsjax.config.checked import differences, shown
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.scores import Answer, Cell
from lsjax.io.files import write_whole, writing
from lsjax.io.lines import Lines
from lsjax.io.rows import Fields
from lsjax.sharding import machine

HEADER, VERSION = "asked", 8  # of a file of answers


@dataclass(frozen=True, kw_only=True)
class Question:
    """One text to decode, from a row of a task.

    id: unique in the data. request: the prompt, shots included. sample: number among the row's
    texts. reference: text to compare with, or empty. group: category. seen: whether the given
    training rows have the same prompt. fields: fields of the row.
    """

    id: str
    request: Request
    sample: int = 0
    reference: str = ""
    group: str = ""
    seen: bool = False
    fields: Fields = field(default_factory=dict, repr=False)

    def key(self, strategy: Strategy) -> str:
        """Hash of all that the strategy's answer depends on, apart from the file's header."""
        prompt, sampling = list(self.request.prompt), self.request.sampling
        seed = sampling.seed if sampling.temperature else None
        row = repr(sorted(self.fields.items()))
        drafted = None if strategy.vocabulary is None else strategy.vocabulary.ids_W.tolist()
        if drafted and strategy.vocabulary.is_int8:
            drafted.append("int8")
        choices = (strategy.exits, strategy.lengths) if isinstance(strategy, Adaptive) else None
        own = [self.id, self.sample, self.reference, self.seen, row, seed]
        return digest([*Cell.of(strategy), drafted, choices, prompt, *own])


def digest(content: Any) -> str:
    """Hash (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def conditions(engine: Engine, name: str, sampling: Sampling, **more: Any) -> dict[str, Any]:
    """The header: all that answers depend on, apart from their keys. A file of answers is resumed
    only under the same conditions. name: of the model."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(engine.model))}
    mesh = engine.runtime.mesh
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    return {
        "version": VERSION,
        "model": name,
        "weights": digest(sorted(fingerprints(leaves).items())),
        "tokenizer": digest([engine.tokenizer.fingerprint, engine.tokenizer.eos_ids]),
        "dtype": str(engine.model.dtype),
        "devices": [device.device_kind for device in devices],
        "machine": machine(),
        "kernels": engine.runtime.kernels,
        "jax": jax.__version__,
        "sampling": asdict(sampling),
        **more,
    }


def complete(
    engine: Engine,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    asked: Mapping[str, Any],
    file: AnyPath,
    notes: Console,
    figures: Callable[[Question, Completion, Completion], dict[str, Any]],
    timed: bool = False,
) -> list[Answer]:
    """The answers to all questions by all strategies. Missing answers are decoded and written.

    Args:
        asked: `conditions` of the file.
        figures: more fields of an answer, from its text and the last text of the first strategy.
        timed: warms up every program. Strategies take turns at each question, so that a slowdown
            of the machine affects all. If any answer of a turn is missing, the first strategy is
            rerun as a baseline.
    """
    known = resume(file, asked)
    wanted = [question.key(strategy) for strategy in strategies for question in questions]
    found = {key: known[key] for key in wanted if key in known}
    done, base, turn = set(found), None, 1 if timed else len(questions)
    if done:
        notes.print(f"{len(done)} of {len(wanted)} answers are already stored")
    compiling = {}
    if timed and len(done) < len(wanted):
        compiling = warm_up(engine, strategies, questions)
    shown = Progress(console=notes, transient=True, disable=not notes.is_terminal)
    with closing(Lines(file)) as lines, shown as progress:
        bar = progress.add_task("decoding", total=len(wanted), completed=len(found))

        def ended(strategy: Strategy, some: list[Question], index: int, text: Completion) -> None:
            nonlocal base
            question = some[index]
            if strategy == strategies[0]:
                base = text
            names = ("id", "sample", "group", "seen", "reference")
            answer = {"key": question.key(strategy)} | {n: getattr(question, n) for n in names}
            answer |= text.to_json() | figures(question, text, base)
            if timed:
                answer["compile_seconds"] = compiling[strategy.program]
            lines.write(as_line(answer))
            found[answer["key"]] = answer
            progress.update(bar, completed=len(found))

        for begin in range(0, len(questions), turn):
            chunk = questions[begin : begin + turn]
            missing = {
                strategy: [one for one in chunk if one.key(strategy) not in done]
                for strategy in strategies
            }
            if timed and any(missing.values()):
                missing[strategies[0]] = chunk
            for strategy, some in missing.items():
                if some:
                    requests = [question.request for question in some]
                    engine.use(strategy)
                    engine.generate(requests, on_completion=partial(ended, strategy, some))
    return [found[key] for key in wanted]


def warm_up(
    engine: Engine, strategies: Sequence[Strategy], questions: Sequence[Question]
) -> dict[Hashable, float]:
    """Compiles and runs each program once. Prompts with equal cache sizes share a program. Returns
    the seconds of compiling, by `Strategy.program`."""
    compiling = {}
    for strategy in {strategy.program: strategy for strategy in strategies}.values():
        before, capacity = engine.programs.compile_seconds, engine.runtime.capacity
        engine.use(strategy)
        sizes = {}
        for request in (question.request for question in questions):
            ends = len(request.prompt) + 1, len(request.prompt) + request.max_new_tokens
            sizes[tuple(capacity(end, strategy) for end in ends)] = request
        for request in sizes.values():
            engine.generate([request])
        compiling[strategy.program] = engine.programs.compile_seconds - before
    return compiling


def resume(file: AnyPath, asked: Mapping[str, Any]) -> dict[str, Answer]:
    """Answers of a file by key. A new file gets a header.

    For duplicate keys, the later answer wins. An incomplete last line is cut off. Raises
    ConfigError if the header differs, listing the differences, or if a line is not an answer.
    """
    header = as_line({HEADER: dict(asked)})
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    if not end and header.encode().startswith(content):
        with writing(file):
            file.write_text(header, encoding="utf-8")
        return {}
    before, answers = read(file)
    changes = ", ".join(
        f"{name} was {shown(was)} and is now {shown(is_)}"
        for name, was, is_ in differences(before, json.loads(header)[HEADER])
    )
    check(
        not changes,
        f"{file} was made with other settings ({changes}): choose another --output, or delete it",
    )
    if end < len(content):
        write_whole(file, content[:end])
    return {answer["key"]: answer for answer in answers}


def read(file: AnyPath) -> tuple[dict[str, Any], list[Answer]]:
    """Header and answers of a file, without an incomplete last line. Raises ConfigError if the
    file is not an answers file."""
    try:
        header, *rows = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        good = HEADER in header and all("key" in row for row in rows)
    except (ValueError, TypeError):  # not JSON, no line, or a line that is not an object
        good = False
    check(good, f"{file} is not a file of answers: choose another --output")
    return header[HEADER], rows


def as_line(row: Mapping[str, Any]) -> str:
    """A header or an answer as a line of the file."""
    return json.dumps(row, ensure_ascii=False) + "\n"
