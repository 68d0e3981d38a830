"""Examples to answers: each decoded by every strategy, scored, and handed on at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answers import Answer
from lsjax.evaluation.tasks.task import Example, Task

# Requests for each row of a batch before the next strategy has its turn: strategies are timed near
# to one another, and a batch is seldom half empty.
TURN = 8


@dataclass(frozen=True)
class Question:
    """One text to decode: sample number `sample` of an example."""

    example: Example
    sample: int
    request: Request

    def key(self, strategy: str) -> tuple[str, str, int]:
        """What tells an answer from all others of a file."""
        return strategy, self.example.id, self.sample


def key_of(answer: dict[str, Any]) -> tuple[str, str, int]:
    """The same of a line of results."""
    return answer["strategy"], answer["id"], answer["sample"]


def answer_all(
    engine: Engine,
    task: Task,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    done: set[tuple[str, str, int]],
    on_answer: Callable[[dict[str, Any]], None],
) -> None:
    """Decodes every question with every strategy, but for what is done, and hands on a line of
    results for each text as it ends. The strategies take turns."""
    queue = iter(questions)
    while turn := list(islice(queue, TURN * engine.batch_size)):
        for strategy in strategies:
            name = str(Answer.by(strategy))
            left = [question for question in turn if question.key(name) not in done]
            if not left:
                continue
            engine.use(strategy)
            before = engine.decode_seconds

            def ended(index: int, completion: Completion, left=left) -> None:
                nonlocal before
                seconds, before = engine.decode_seconds - before, engine.decode_seconds
                on_answer(line(task, left[index], completion, seconds))

            engine.generate([question.request for question in left], on_completion=ended)


def line(task: Task, question: Question, completion: Completion, seconds: float) -> dict[str, Any]:
    """An answer as a line of results, which says what decoded it.

    seconds: of decoding since the answer before; those of all lines sum up to the time that
    decoding took, whatever the size of the batch.
    """
    example = question.example
    return {
        "strategy": str(Answer.of(completion)),
        "exit_layer": completion.exit_layer,
        "num_draft_tokens": completion.num_draft_tokens,
        "draft_vocab": completion.draft_vocab,
        "draft_confidence": completion.draft_confidence,
        "id": example.id,
        "sample": question.sample,
        "group": example.group,
        "seen": example.seen,
        "text": completion.text,
        "reference": example.reference,
        "scores": task.score(completion.text, example),
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_new_tokens": completion.num_new_tokens,
        "rounds": completion.rounds,
        "drafted": completion.drafted,
        "accepted": completion.accepted,
        "drafted_by_position": completion.drafted_by_position,
        "accepted_by_position": completion.accepted_by_position,
        "prefill_seconds": completion.prefill_seconds,
        "seconds": seconds,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }
