"""Questions decoded by several strategies in turns, the file of answers, and its figures.

A line of the file is one answer, written when it is ready, so a killed run resumes. An answer is
known by its strategy, document and sample. The first line holds what all answers depend on, such
as a hash of the weights. A last line without an end is what a killed run left.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lsjax.config import check
from lsjax.config.checked import differences, shown
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.state import Strategy
from lsjax.evaluation.examples import Example

HEADER = "asked"
ALL, UNSEEN = "all", "not seen in training"  # groups that are no category
PASS_AT = (1, 10, 100)

Answer = Mapping[str, Any]  # a line of the file


class Cell(NamedTuple):
    """A strategy with its settings: one cell of a grid."""

    strategy: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_vocab: int | None = None
    draft_confidence: float | None = None

    @classmethod
    def of(cls, found: Strategy | Answer) -> "Cell":
        """The cell of a strategy, or of a line of answers."""
        if isinstance(found, Strategy):
            return cls(found.name, *(getattr(found, name) for name in cls._fields[1:]))
        return cls(*(found[name] for name in cls._fields))

    def __str__(self) -> str:
        parts = [self.strategy.replace("_", " ")]
        if self.exit_layer is not None:
            parts.append(f"exit {self.exit_layer}")
        if self.num_draft_tokens is not None:
            of = "" if self.draft_vocab is None else f" of {self.draft_vocab} tokens"
            parts.append(f"{self.num_draft_tokens} drafts{of}")
        if self.draft_confidence is not None:
            parts.append(f"at {self.draft_confidence:g} or more")
        return ", ".join(parts)


@dataclass(frozen=True)
class Question:
    """One text to decode: sample number `sample` of an example. The request's prompt is ids."""

    example: Example
    sample: int
    request: Request

    @property
    def document(self) -> str:
        """Hash of all that the answer depends on beside the first line of its file."""
        example, sampling = self.example, self.request.sampling
        seed = sampling.seed if sampling.temperature else None
        row = repr(sorted(example.fields.items()))
        return digest([list(self.request.prompt), example.reference, example.seen, row, seed])


def digest(content: Any) -> str:
    """Hash (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def decode_in_turns(
    engine: Engine,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    done: Collection[tuple],
    on_answer: Callable[[Question, Completion, float], None],
    *,
    turn: int,
    beside_first: bool = False,
) -> None:
    """Decodes every question with every strategy, except the keys that are `done`.

    Strategies take turns of `turn` questions, so that a machine that slows down slows all of them.
    on_answer: called as each text ends, with the seconds of decoding since the text before. Those
    of all texts sum up to the time that decoding took, whatever the size of the batch.
    beside_first: decodes with the first strategy again beside others of its turn that are missing.
    """
    queue = iter(questions)
    while chunk := list(islice(queue, turn)):
        missing = {
            strategy: [one for one in chunk if key_of(one, Cell.of(strategy)) not in done]
            for strategy in strategies
        }
        if beside_first and any(missing.values()):
            missing[strategies[0]] = chunk
        for strategy, wanted in missing.items():
            if not wanted:
                continue
            engine.use(strategy)
            before = engine.decode_seconds

            def ended(index: int, completion: Completion, wanted=wanted) -> None:
                nonlocal before
                seconds, before = engine.decode_seconds - before, engine.decode_seconds
                on_answer(wanted[index], completion, seconds)

            engine.generate([one.request for one in wanted], on_completion=ended)


def key_of(question: Question, cell: Cell) -> tuple:
    """What tells an answer from the others of its file."""
    return cell, question.example.id, question.sample, question.document


def key_of_answer(answer: Answer) -> tuple:
    """The same of a line of the file."""
    return Cell.of(answer), answer["id"], answer["sample"], answer["document"]


def answer_line(question: Question, completion: Completion, seconds: float) -> dict[str, Any]:
    """An answer as a line of the file; the caller adds scores."""
    example = question.example
    names = (
        *("text", "num_prompt_tokens", "num_new_tokens", "rounds", "drafted", "accepted"),
        *("drafted_by_position", "accepted_by_position", "prefill_seconds", "finish_reason"),
        *(*Cell._fields, "seed"),
    )
    return {
        **{"id": example.id, "sample": question.sample, "document": question.document},
        **{"group": example.group, "seen": example.seen, "reference": example.reference},
        **{name: getattr(completion, name) for name in names},
        "seconds": seconds,
    }


def resume(file: Path, asked: Mapping[str, Any]) -> dict[tuple, Answer]:
    """The answers of a file by their keys (`key_of`); a new file begins with its header.

    The later of two answers with one key counts. Cuts off a torn last line. Raises ConfigError
    where the header is another, with what differs, and for a line that is no answer.
    """
    header = _line({HEADER: dict(asked)})
    content = file.read_bytes() if file.exists() else b""
    if b"\n" not in content and header.encode().startswith(content):
        file.write_text(header, encoding="utf-8")
        return {}
    before, answers = read(file)
    changes = ", ".join(
        f"{name} was {shown(was)} and is now {shown(is_)}"
        for name, was, is_ in differences(before, json.loads(header)[HEADER])
    )
    check(
        not changes,
        f"{file} holds answers to something else: {changes}; name another --output, or remove it",
    )
    with file.open("rb+") as stream:
        stream.truncate(content.rfind(b"\n") + 1)
    return {key_of_answer(answer): answer for answer in answers}


def read(file: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Header and answers of a file, without a torn last line.

    Raises ConfigError for another file.
    """
    needed = {*Cell._fields, "id", "sample", "document"}
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        good = isinstance(row, dict) and (HEADER in row if number == 1 else needed <= row.keys())
        check(good, f"{file}, line {number} is no answer: name another --output, or remove it")
        rows.append(row)
    check(bool(rows), f"{file} holds no answers: name another --output, or remove it")
    return rows[0][HEADER], rows[1:]


def append(file: Path, answer: Answer) -> None:
    """Adds an answer; the line is written whole."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_line(answer))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def grouped(answers: Sequence[Answer]) -> Iterator[tuple[Cell, str, list[Answer]]]:
    """Answers of each strategy: all, those to examples that training has not seen if it has seen
    some, and those of each category if there are several."""
    for cell in dict.fromkeys(map(Cell.of, answers)):
        own = [one for one in answers if Cell.of(one) == cell]
        yield cell, ALL, own
        unseen = [one for one in own if not one["seen"]]
        if 0 < len(unseen) < len(own):
            yield cell, UNSEEN, unseen
        names = sorted({one["group"] for one in own})
        for name in names if len(names) > 1 else ():
            yield cell, name, [one for one in own if one["group"] == name]


def acceptance(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Acceptance rate and tokens per round of all texts together."""
    drafted, accepted, rounds = (
        sum(one[name] for one in answers) for name in ("drafted", "accepted", "rounds")
    )
    later = sum(one["num_new_tokens"] - 1 for one in answers)
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_round": later / rounds if rounds else None,
    }


def summarise(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Figures of each strategy and group (`grouped`). Undefined ones are None.

    scores: mean and standard error over the examples, of the mean over an example's samples.
    tokens_per_second: new tokens after the first of each text over the time of decoding. speedup:
    over autoregressive decoding. equal: share of the texts that are those of autoregressive
    decoding, where both are greedy.
    """
    plain = Cell("autoregressive")
    texts = {one["id"]: one["text"] for one in answers if Cell.of(one) == plain}
    rows, base = [], {}
    for cell, group, own in grouped(answers):
        new_tokens, seconds = (
            sum(one[name] for one in own) for name in ("num_new_tokens", "seconds")
        )
        speed = (new_tokens - len(own)) / seconds if seconds else None
        if cell == plain:
            base[group] = speed
        beside = [one for one in own if one["seed"] is None and one["id"] in texts]
        same = [one["text"] == texts[one["id"]] for one in beside]
        scores = {name: [*means.values()] for name, means in scores_by_example(own).items()}
        rows.append(
            {
                "strategy": str(cell),
                "group": group,
                "examples": len({one["id"] for one in own}),
                "answers": len(own),
                "scores": {
                    name: {"mean": statistics.fmean(means), "stderr": standard_error(means)}
                    for name, means in scores.items()
                },
                "equal": statistics.fmean(same) if same else None,
                **acceptance(own),
                "tokens_per_second": speed,
                "new_tokens": new_tokens,
            }
        )
    for row in rows:
        speed, before = row["tokens_per_second"], base.get(row["group"])
        row["speedup"] = speed / before if speed is not None and before else None
    return rows


def scores_by_example(answers: Iterable[Answer]) -> dict[str, dict[str, float]]:
    """Each score's mean over an example's samples, by the example's id; of `passed` the unbiased
    estimates of pass@k that the samples are enough for."""
    samples: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        for name, value in answer["scores"].items():
            samples.setdefault(name, {}).setdefault(answer["id"], []).append(value)
    passed = samples.pop("passed", {})
    fewest = min(map(len, passed.values()), default=0)
    return {
        f"pass@{k}": {one: pass_at_k(len(p), int(sum(p)), k) for one, p in passed.items()}
        for k in PASS_AT
        if k <= fewest
    } | {
        name: {example: statistics.fmean(values) for example, values in by_example.items()}
        for name, by_example in samples.items()
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, from more samples (Chen et al., 2021, eq. 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
