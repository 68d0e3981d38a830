"""Spec-Bench (Xia et al., 2024): the usual mix of prompts for speculative decoding, 80 of each of
six kinds. Its file has MT-bench under eight labels, with two turns, of which the first is asked."""

from lsjax.config import check
from lsjax.evaluation.rouge import rouge
from lsjax.evaluation.tasks.gsm8k import score as score_number
from lsjax.evaluation.tasks.task import Example, Row, Task

MT_BENCH = {
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
}


def first_turn(row: Row) -> Row:
    """The row with its first turn as "prompt", the first reference, if it is a text, and one of
    six categories."""
    match row:
        case {"turns": [str(prompt), *_], "category": str(category)}:
            pass
        case _:
            check(False, 'is no question of Spec-Bench: it needs "turns" and "category"')
    match row.get("reference"):
        case [str(reference), *_] if category not in MT_BENCH:
            pass
        case _:
            reference = ""
    return {
        **row,
        "prompt": prompt,
        "reference": reference,
        "category": "mt_bench" if category in MT_BENCH else category,
    }


def score(text: str, example: Example) -> dict[str, float]:
    """The final number in math_reasoning, ROUGE in summarization and translation."""
    match example.group:
        case "math_reasoning":
            return score_number(text, example)
        case "summarization" | "translation":
            return rouge(text, example.reference)
    return {}


SPEC_BENCH = Task(
    name="spec_bench",
    prompt_template="{prompt}",
    response_template="{reference}",
    score=score,
    max_new_tokens=512,
    fields=first_turn,
    id="question_id",
    group="category",
    needs_reference=False,
)
