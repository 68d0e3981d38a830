"""Any rows of a prompt and a response."""

from lsjax.evaluation.rouge import rouge
from lsjax.evaluation.tasks.task import Example, Task


def score(text: str, example: Example) -> dict[str, float]:
    """exact_match: the same text, but for white space around it; and ROUGE."""
    same = text.strip() == example.reference.strip()
    return {"exact_match": float(same), **rouge(text, example.reference)}


PAIRS = Task(
    name="pairs",
    prompt_template="{prompt}",
    response_template="{response}",
    score=score,
    max_new_tokens=128,
)
