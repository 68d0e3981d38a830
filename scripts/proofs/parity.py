"""Compares lsjax with transformers' results for SmolLM2-135M (tests/golden/smollm2.json).

    python scripts/proofs/parity.py models/SmolLM2-135M-Instruct.Q4_1.gguf

Prints a line for each check; exits with 1 if one fails. `make parity` gets the model and runs this.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.data.chat import Dialogue
from lsjax.evaluation.comparison import FLOAT32_MARGIN, first_difference

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "smollm2.json"
LOSS_TOLERANCE = 1e-3


def main(path: Path) -> int:
    """Runs all checks."""
    keep_compiled_programs()
    exact_products()
    golden = json.loads(GOLDEN.read_text())
    model, tokenizer = lsjax.load(path), lsjax.load_tokenizer(path)
    failures = 0

    def report(good: bool, what: str) -> None:
        nonlocal failures
        failures += not good
        print("ok  " if good else "FAIL", what, flush=True)

    engine = lsjax.Engine(model, tokenizer)
    report(
        Dialogue(tokenizer).prompt(golden["question"])[0] == golden["greedy"][-1]["prompt"],
        "chat template rendered as by transformers",
    )
    for case in golden["greedy"]:
        name = repr(case["prompt"][:40])
        report(tokenizer.encode(case["prompt"]) == case["ids"], f"tokens of {name}")
        (found,) = engine.generate([case["ids"]], max_new_tokens=48)
        difference = first_difference(model, case["ids"], case["new"], found.token_ids)
        same = difference is None or difference.margin <= FLOAT32_MARGIN
        report(same, f"{len(case['new'])} greedy tokens after {name} {difference or ''}")

    paragraph = golden["paragraph"]
    ids_BT = jnp.asarray([paragraph["ids"]])
    losses = np.asarray(jax.jit(exit_losses)(model, ids_BT))
    wanted = np.array(paragraph["exit_losses"])
    report(
        abs(losses[-1] - wanted[-1]) < LOSS_TOLERANCE,
        f"loss of the paragraph {losses[-1]:.5f}, transformers {wanted[-1]:.5f}",
    )
    widest = np.abs(losses / wanted - 1).max()
    report(widest < LOSS_TOLERANCE, f"loss at exits 0..{len(losses) - 1}, relative {widest:.1e}")
    return 1 if failures else 0


def exit_losses(model, tokens_BT):
    """Mean next-token loss after 0, 1, ..., L layers."""
    x_BTD, exits_LBTD = model.embed(tokens_BT), model.exits(tokens_BT)
    labels = tokens_BT[:, 1:, None]

    def loss(x_BTD):
        log_probs = jax.nn.log_softmax(model.unembed(x_BTD)[:, :-1])
        return -jnp.take_along_axis(log_probs, labels, axis=-1).mean()

    return jnp.stack([loss(x_BTD), *map(loss, exits_LBTD)])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
