"""The price of int8 weights in quality: loss and agreement of every exit, beside the original.

    python scripts/int8_study.py --model smollm2 --text wiki.test.txt --output build/evidence/int8

Scores the same tokens with both, in float32. Prints a table, and writes it for scripts/results.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from evidence_list import TABLE

import lsjax
from lsjax.evaluation.exits import ExitScores, score_exits
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table

ROWS, LENGTH = 4, 512  # of a batch


@dataclass(frozen=True)
class Arguments:
    """What to score."""

    model: str
    """The model, in any format."""
    text: Path
    """Text that the model was not trained on."""
    output: Path
    """Folder of the table."""
    tokens: int = 50_000
    """Tokens of the text that are scored."""
    exits: tuple[int, ...] = (2, 4, 8, 15, 23)
    """Exits in the table, beside the last one."""


def main(arguments: Arguments) -> int:
    """Prints the table."""
    tokenizer = lsjax.load_tokenizer(arguments.model)
    ids = tokenizer.encode(arguments.text.read_text()[: 8 * arguments.tokens], add_bos=False)
    rows = -(-arguments.tokens // LENGTH // ROWS) * ROWS
    found = {
        weights: scored(arguments.model, weights, np.array(ids[: rows * LENGTH + 1], np.int32))
        for weights in ("float", "int8")
    }
    plain, small = found["float"], found["int8"]
    lines = [("exit", "loss", "loss with int8", "agreement", "agreement with int8")]
    for exit_layer in (*arguments.exits, len(plain.loss_E)):
        at = exit_layer - 1
        losses = f"{plain.loss_E[at]:.4f}", f"{small.loss_E[at]:.4f}"
        lines.append(
            (exit_layer, *losses, *(f"{one.agreement_E[at]:.3f}" for one in (plain, small)))
        )
    change = small.loss_E[-1] / plain.loss_E[-1] - 1
    words = f"On {plain.tokens:,} tokens, the loss with int8 is {change:+.2%} of the original's."
    about = [("measured on", ""), *made_on().items()]
    text = "\n".join([words, "", *table(lines), "", *table(about)])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / TABLE).write_text(text + "\n", "utf-8")
    print(text)
    return 0


def scored(path: str, weights: str, ids: np.ndarray) -> ExitScores:
    """Scores of all exits."""
    model = lsjax.load(path, weights=weights)
    tokens = ids[:-1].reshape(-1, ROWS, LENGTH)
    labels = ids[1:].reshape(-1, ROWS, LENGTH)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    batches = (
        {
            "tokens_BT": one,
            "labels_BT": label,
            "segments_BT": np.ones_like(one),
            "positions_BT": positions,
        }
        for one, label in zip(tokens, labels, strict=True)
    )
    return score_exits(model, batches)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
