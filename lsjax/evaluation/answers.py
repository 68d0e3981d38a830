"""Decodes questions with several strategies, stores the answers, and summarises them.

Each line of the file is one answer, written when it is ready, so a killed run resumes. An answer is
identified by its strategy, document and sample. The first line holds what all answers depend on,
such as a hash of the weights. An incomplete last line comes from a killed run.
"""

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from lsjax.config import Path, check
from lsjax.config.checked import differences, shown
from lsjax.data.files import write_whole
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.examples import Example

HEADER = "asked"
ALL, UNSEEN = "all", "not seen in training"  # groups besides the task's categories
PASS_AT = (1, 10, 100)

Answer = Mapping[str, Any]  # a line of the file
Key = tuple[Any, ...]  # identifies an answer: values of KEY


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
            of = "" if self.draft_vocab is None else f", vocabulary {self.draft_vocab}"
            parts.append(f"{self.num_draft_tokens} drafts{of}")
        if self.draft_confidence is not None:
            parts.append(f"confidence {self.draft_confidence:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Question:
    """One text to decode: sample number `sample` of an example. The request holds token ids."""

    example: Example
    sample: int
    request: Request

    @property
    def document(self) -> str:
        """Hash of everything that the answer depends on, apart from the file's header."""
        example, sampling = self.example, self.request.sampling
        seed = sampling.seed if sampling.temperature else None
        row = repr(sorted(example.fields.items()))
        return digest([list(self.request.prompt), example.reference, example.seen, row, seed])

    def key(self, strategy: Strategy) -> Key:
        """Key that identifies this strategy's answer."""
        return *Cell.of(strategy), self.example.id, self.sample, self.document


KEY = (*Cell._fields, "id", "sample", "document")


def key_of(answer: Answer) -> Key:
    """Key of a stored answer line."""
    return tuple(answer[name] for name in KEY)


def digest(content: Any) -> str:
    """Hash (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def decode_in_turns(
    engine: Engine,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    done: Collection[Key],
    on_answer: Callable[[Question, Completion], None],
    *,
    turn: int,
    beside_first: bool = False,
) -> None:
    """Decodes every question with every strategy, except answers whose keys are in `done`.

    Strategies take turns of `turn` questions, so that a slowdown of the machine affects all.
    on_answer: called as each text ends. beside_first: if any answer of a turn is missing, reruns
    the first strategy as a baseline.
    """
    queue = iter(questions)
    while chunk := list(islice(queue, turn)):
        missing = {
            strategy: [one for one in chunk if one.key(strategy) not in done]
            for strategy in strategies
        }
        if beside_first and any(missing.values()):
            missing[strategies[0]] = chunk
        for strategy, wanted in missing.items():
            if not wanted:
                continue
            engine.use(strategy)
            engine.generate(
                [one.request for one in wanted],
                on_completion=lambda index, found, wanted=wanted: on_answer(wanted[index], found),
            )


def answer_line(question: Question, completion: Completion, **more: Any) -> dict[str, Any]:
    """An answer as a line of the file."""
    example = question.example
    names = (
        *("text", "num_prompt_tokens", "num_new_tokens", "rounds", "drafted", "accepted"),
        *("drafted_by_position", "accepted_by_position", "finish_reason", *Cell._fields, "seed"),
    )
    return {
        **{"id": example.id, "sample": question.sample, "document": question.document},
        **{"group": example.group, "seen": example.seen, "reference": example.reference},
        **{name: getattr(completion, name) for name in names},
        **more,
    }


def resume(file: Path, asked: Mapping[str, Any]) -> dict[Key, Answer]:
    """Answers of a file by key. A new file gets a header.

    For duplicate keys, the later answer wins. An incomplete last line is cut off. Raises
    ConfigError if the header differs, listing the differences, or if a line is not an answer.
    """
    header = as_line({HEADER: dict(asked)})
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
        f"{file} was made with other settings ({changes}): choose another --output, or delete it",
    )
    if not content.endswith(b"\n"):
        write_whole(file, content[: content.rfind(b"\n") + 1])
    return {key_of(answer): answer for answer in answers}


def read(file: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Header and answers of a file, without an incomplete last line.

    Raises ConfigError if the file is not an answers file.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        needed = {HEADER} if number == 1 else {*KEY}
        good = isinstance(row, dict) and needed <= row.keys()
        check(good, f"{file}, line {number} is not an answer: choose another --output")
        rows.append(row)
    check(bool(rows), f"{file} has no answers: choose another --output, or delete it")
    return rows[0][HEADER], rows[1:]


def as_line(row: Mapping[str, Any]) -> str:
    """A header or an answer as a line of the file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def grouped(answers: Sequence[Answer]) -> Iterator[tuple[Cell, str, list[Answer]]]:
    """All answers of each strategy. Adds unseen examples if only some were seen in training, and
    each category if there are several."""
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
    """Acceptance rate and tokens per round, over all texts."""
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

    scores: mean and standard error over examples; samples are averaged per example first.
    equal: share of greedy texts identical to autoregressive decoding.
    """
    plain = Cell("autoregressive")
    texts = {one["id"]: one["text"] for one in answers if Cell.of(one) == plain}
    rows = []
    for cell, group, own in grouped(answers):
        compared = [one for one in own if one["seed"] is None and one["id"] in texts]
        same = [one["text"] == texts[one["id"]] for one in compared]
        rows.append(
            {
                "strategy": str(cell),
                "group": group,
                "examples": len({one["id"] for one in own}),
                "answers": len(own),
                "scores": {
                    name: {"mean": statistics.fmean(means), "stderr": standard_error(means)}
                    for name, means in example_scores(own).items()
                },
                "equal": statistics.fmean(same) if same else None,
                **acceptance(own),
            }
        )
    return rows


def example_scores(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Scores of every example, averaged over its samples. `passed` becomes unbiased estimates of
    pass@k, for each k of PASS_AT up to the sample count."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for name, value in answer["scores"].items():
            samples[name][answer["id"]].append(value)
    means = {}
    for name, by_example in samples.items():
        values = by_example.values()
        if name != "passed":
            means[name] = [*map(statistics.fmean, values)]
            continue
        for k in PASS_AT:
            if k <= min(map(len, values)):
                means[f"pass@{k}"] = [pass_at_k(len(one), int(sum(one)), k) for one in values]
    return means


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, from more samples (Chen et al., 2021, eq. 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
