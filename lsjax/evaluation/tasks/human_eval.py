"""HumanEval (Chen et al., 2021): Python functions to write from their signature and docstring."""

from lsjax.config import check
from lsjax.evaluation.rouge import rouge
from lsjax.evaluation.sandbox import run_program
from lsjax.evaluation.tasks.task import Example, Row, Task

# Where the function that was asked for has ended (the stop sequences of Chen et al., section 2.3).
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def function_body(text: str) -> str:
    """The text up to what follows the function."""
    return text[: min([len(text), *(at for end in ENDS if (at := text.find(end)) >= 0)])]


def program(text: str, example: Example) -> str:
    """The prompt with the text, and the problem's tests, as a program that fails if they do."""
    row = example.row
    return f"{row['prompt']}{function_body(text)}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"


def problem(row: Row) -> Row:
    """The row, if it has what its text is tested by."""
    for field in ("test", "entry_point"):
        check(
            isinstance(row.get(field), str),
            f"has no text under {field!r}: name HumanEval's own file (docs/evaluation.md)",
        )
    return row


def score(text: str, example: Example) -> dict[str, float]:
    """ROUGE against the canonical solution, as in the paper."""
    return rouge(text, example.reference)


def score_by_running(text: str, example: Example) -> dict[str, float]:
    """passed: whether the function passes the problem's tests; and ROUGE."""
    passed = run_program(program(text, example)).passed
    return {"passed": float(passed), **rouge(text, example.reference)}


HUMAN_EVAL = Task(
    name="human_eval",
    prompt_template="{prompt}",
    response_template="{canonical_solution}",
    score=score,
    score_by_running=score_by_running,
    max_new_tokens=512,
    fields=problem,
    id="task_id",
)
