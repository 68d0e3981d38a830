"""The price of int8 weights: loss, agreement, scores of two tasks and speed, beside the original.

    pip install -e '.[eval]'
    python scripts/int8_study.py --model smollm2 --text wikitext2.txt --topv2 topv2 \\
        --output build/evidence/int8

Scores the same tokens with both, in float32. The tasks are those of docs/tasks, run by lm_eval.
The same command resumes. Prints tables, and writes them for scripts/results.py.
"""

import csv
import json
import os
import statistics
import subprocess
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
from lsjax.io.files import write_json
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table
from lsjax.rollouts.log_probs import states_after

ROWS, LENGTH = 4, 512  # of a batch
TASKS = {"request_topic": "acc", "request_parse": "chrf"}
TOPICS = ("alarm", "event", "messaging", "music", "navigation", "reminder", "timer", "weather")


@dataclass(frozen=True)
class Arguments:
    """What to score."""

    model: str
    """The model, in any format."""
    text: Path
    """Text that the model was not trained on."""
    output: Path
    """Folder of the table."""
    topv2: Path
    """Folder with TOPv2's train.tsv and test.tsv."""
    tokens: int = 50_000
    """Tokens of the text that are scored."""
    exits: tuple[int, ...] = (8, 15)
    """Exits in the table, beside the last one."""
    limit: int = 100
    """Documents of each task."""
    repeats: int = 5
    """Timed texts of each."""


def main(arguments: Arguments) -> int:
    """Prints the table."""
    tokenizer = lsjax.load_tokenizer(arguments.model)
    ids = tokenizer.encode(arguments.text.read_text()[: 8 * arguments.tokens], add_bos=False)
    rows = -(-arguments.tokens // LENGTH // ROWS) * ROWS
    some = np.array(ids[: rows * LENGTH + 1], np.int32)
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for weights in ("float", "int8"):
        file = arguments.output / f"exits-{weights}.json"
        if not file.exists():
            sums = scored(arguments.model, weights, arguments.exits, some)
            write_json(file, [one.tolist() for one in sums])
        found[weights] = json.loads(file.read_text())
    lines = [("exit", "loss", "loss with int8", "agreement", "agreement with int8")]
    losses, agreements = ({w: one[at] for w, one in found.items()} for at in (0, 1))
    for at, exit_layer in enumerate((*arguments.exits, "last")):
        shown = [f"{losses[weights][at]:.4f}" for weights in found]
        shown += [f"{agreements[weights][at]:.3f}" for weights in found]
        lines.append((exit_layer, *shown))
    change = losses["int8"][-1] / losses["float"][-1] - 1
    words = f"On {rows * LENGTH:,} tokens, the loss with int8 is {change:+.2%} of the original's."
    speed, about = speed_rows(arguments, some), [("measured on", ""), *made_on().items()]
    tables = [lines, task_rows(arguments), speed, about]
    text = "\n".join([words, *("\n".join(["", *table(rows)]) for rows in tables)])
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


def task_rows(arguments: Arguments) -> list[tuple[str, ...]]:
    """Scores of the tasks, with standard errors."""
    folder = arguments.output.resolve()
    write_requests(arguments.topv2 / "train.tsv", folder / "requests_train.jsonl", one_each=True)
    write_requests(arguments.topv2 / "test.tsv", folder / "requests_test.jsonl")
    found = {}
    for weights in ("float", "int8"):
        file = folder / f"tasks-{weights}.json"
        if not file.exists():
            write_json(file, task_scores(arguments, weights))
        found[weights] = json.loads(file.read_text())
    return [
        (f"task, {arguments.limit} documents", "score", "original", "with int8"),
        *((name, metric, *(one[name] for one in found.values())) for name, metric in TASKS.items()),
    ]


def task_scores(arguments: Arguments, weights: str) -> dict[str, str]:
    """Scores of these weights, by task."""
    folder = arguments.output.resolve() / f"tasks-{weights}"
    command = [
        sys.executable,
        "-m",
        "lsjax",
        "lm-eval",
        "--model",
        f"{Path(arguments.model).resolve()}",
    ]
    command += ["--tasks", *TASKS, "--task-path", f"{Path(__file__).parents[1] / 'docs' / 'tasks'}"]
    command += ["--weights", weights, "--limit", f"{arguments.limit}", "--batch-size", "8"]
    command += ["--output", f"{folder}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=arguments.output, env=environment)
    (file,) = folder.rglob("results*.json")
    found = json.loads(file.read_text())["results"]
    return {name: scored_as(found[name], metric) for name, metric in TASKS.items()}


def scored_as(found: dict[str, float | str], metric: str) -> str:
    """A metric of a task with its standard error, as lm_eval writes both."""
    values = {key.partition(",")[0]: value for key, value in found.items()}
    return f"{values[metric]:.3f} (standard error {values[f'{metric}_stderr']:.3f})"


def write_requests(source: Path, file: Path, *, one_each: bool = False) -> None:
    """Requests of TOPv2 for the tasks. one_each: the first of each topic."""
    with source.open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if one_each:
        rows = [next(row for row in rows if row["domain"] == topic) for topic in TOPICS]
    found = (
        dict(text=row["en_query"], parse=row["en_parse"], label=TOPICS.index(row["domain"]))
        for row in rows
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def speed_rows(arguments: Arguments, ids: np.ndarray) -> list[tuple[str, ...]]:
    """Tokens a second of autoregressive decoding, and the size of the weights. Both take turns."""
    tokenizer, engines, sizes = lsjax.load_tokenizer(arguments.model), {}, {}
    for weights in ("float", "int8"):
        model = lsjax.load(arguments.model, weights=weights)
        sizes[weights] = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        engines[weights] = lsjax.Engine(model, tokenizer, ignore_end=True)
    speeds: dict[str, list[float]] = {weights: [] for weights in engines}
    for repeat in range(-1, arguments.repeats):  # the first one compiles
        for weights, engine in engines.items():
            (one,) = engine.generate([ids[:64].tolist()], max_new_tokens=64)
            if repeat >= 0:
                speeds[weights].append(len(one.token_ids) / one.decode_seconds)
    rows = [("weights", "MB", "tokens/s on this CPU", "lowest", "highest")]
    for weights, found in speeds.items():
        shown = (f"{value:.1f}" for value in (statistics.median(found), min(found), max(found)))
        rows.append((weights, f"{sizes[weights] / 1e6:.0f}", *shown))
    return rows


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
