"""The price of int8 weights in quality: loss and agreement of every exit, beside the original.

    python scripts/int8_study.py --model smollm2 --text wiki.test.txt --output build/evidence/int8

Scores the same tokens with both, in float32. Prints a table, and writes it for scripts/results.py.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from evidence_list import TABLE

import lsjax
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table
from lsjax.rollouts.log_probs import states_after

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
    exits: tuple[int, ...] = (8, 15)
    """Exits in the table, beside the last one."""


def main(arguments: Arguments) -> int:
    """Prints the table."""
    tokenizer = lsjax.load_tokenizer(arguments.model)
    ids = tokenizer.encode(arguments.text.read_text()[: 8 * arguments.tokens], add_bos=False)
    rows = -(-arguments.tokens // LENGTH // ROWS) * ROWS
    some = np.array(ids[: rows * LENGTH + 1], np.int32)
    found = {
        weights: scored(arguments.model, weights, arguments.exits, some)
        for weights in ("float", "int8")
    }
    lines = [("exit", "loss", "loss with int8", "agreement", "agreement with int8")]
    losses, agreements = ({w: one[at] for w, one in found.items()} for at in (0, 1))
    for at, exit_layer in enumerate((*arguments.exits, "last")):
        shown = [f"{losses[weights][at]:.4f}" for weights in found]
        shown += [f"{agreements[weights][at]:.3f}" for weights in found]
        lines.append((exit_layer, *shown))
    change = losses["int8"][-1] / losses["float"][-1] - 1
    words = f"On {rows * LENGTH:,} tokens, the loss with int8 is {change:+.2%} of the original's."
    about = [("measured on", ""), *made_on().items()]
    text = "\n".join([words, "", *table(lines), "", *table(about)])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / TABLE).write_text(text + "\n", "utf-8")
    print(text)
    return 0


def scored(
    path: str, weights: str, exits: tuple[int, ...], ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each exit, the last one last, and its agreement with the last exit."""
    model = lsjax.load(path, weights=weights)
    exits = (*exits, model.num_layers)
    tokens = ids[:-1].reshape(-1, ROWS, LENGTH)
    labels = ids[1:].reshape(-1, ROWS, LENGTH)
    score = jax.jit(partial(sums, exits))
    parts = [score(model, *both) for both in zip(tokens, labels, strict=True)]
    loss_E, agreed_E = (np.sum([part[at] for part in parts], 0) for at in (0, 1))
    return loss_E / labels.size, agreed_E / labels.size


def sums(exits, model, tokens_BT, labels_BT):
    """Sums over the tokens of a batch, for each exit."""
    batch = {
        "tokens_BT": tokens_BT,
        "segments_BT": jnp.ones_like(tokens_BT),
        "positions_BT": jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape),
    }
    x_EBTD = states_after(model, batch, exits)

    def of_token(given):
        x_ED, label = given
        logits_EV = model.unembed(x_ED)
        loss_E = jax.nn.logsumexp(logits_EV, axis=-1) - logits_EV[:, label]
        best_E = logits_EV.argmax(-1)
        return loss_E, best_E == best_E[-1]

    x_NED = jnp.moveaxis(x_EBTD.reshape(len(exits), -1, x_EBTD.shape[-1]), 0, 1)
    found = jax.lax.map(of_token, (x_NED, labels_BT.reshape(-1)), batch_size=128)
    return jax.tree.map(lambda values_NE: values_NE.sum(0), found)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
