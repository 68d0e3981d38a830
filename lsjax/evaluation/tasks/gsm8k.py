"""GSM8K (Cobbe et al., 2021): school mathematics in words; the final number counts."""

import re
from decimal import Decimal

from lsjax.evaluation.tasks.task import Example, Task

MARK = "####"  # before the final number of a reference
# A minus belongs to the number unless it stands behind something to subtract from.
NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?)")


def final_number(text: str) -> Decimal | None:
    """The first number behind ####, or else the last number of the text."""
    before, mark, behind = text.partition(MARK)
    found = list(NUMBER.finditer(behind if mark else before))
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    value = Decimal(chosen[1].replace(",", ""))
    return -value if chosen[0].startswith("-") else value


def score(text: str, example: Example) -> dict[str, float]:
    """accuracy: the same final number."""
    found = final_number(text)
    return {"accuracy": float(found is not None and found == final_number(example.reference))}


GSM8K = Task(
    name="gsm8k",
    prompt_template="Question: {question}\nAnswer:",
    response_template=" {answer}",
    score=score,
    max_new_tokens=256,
    between_shots="\n\n",
    stop=("\nQuestion:",),
    tfds=("gsm8k", "test", "train"),
)
