"""Is auto faster than every static setting, over four kinds of prompts?

    python scripts/proofs/mixed_prompts.py --spec-bench question.jsonl --topv2 topv2/test.tsv \\
        --code runs/quickstart/prompts.jsonl --output mixed -- --model runs/quickstart \\
        --strategies self_speculative auto --exit-layers 2 4 --num-draft-tokens 4 6 8 12 \\
        --draft-confidence 0 0.3 --new-tokens 128 --repeats 1

What follows `--` goes to `lsjax benchmark`, which runs all settings in turns and checks that all
texts are equal. The same command resumes. A speedup is the time of autoregressive decoding over
that of the setting, for all texts of a kind; of repeats the median counts. The kinds weigh the
same: the mixed speedup is the harmonic mean of theirs. The best static setting is the best one on
these very prompts. In brackets are 95% intervals, by the bootstrap over the prompts. Writes
table.md, and exits with 1 if auto is below a limit.
"""

import csv
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lsjax.cli import main as command
from lsjax.evaluation.intervals import from_samples
from lsjax.evaluation.scores import Cell
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table

QUOTED = 170  # characters of a text that its prompt quotes
# Of the mixed set: at least this times the best static setting. Of each kind: likewise, and at
# least this times autoregressive decoding.
MIXED, OF_STATIC, OF_PLAIN = 1.08, 0.97, 0.97
TABLE = "table.md"  # as in scripts/evidence_list.py
HEADING = ("prompts", "auto", "best fixed setting", "its speedup", "auto over it")


@dataclass(frozen=True)
class Arguments:
    """Auto against static settings."""

    spec_bench: Path
    """Spec-Bench's question.jsonl."""
    topv2: Path
    """A .tsv file of TOPv2 with requests in the column en_query."""
    code: Path
    """A .jsonl file with pieces of code as "prompt", such as prompts.jsonl of a run."""
    output: Path
    """Directory for prompts, answers and the table."""
    prompts: int = 6
    """Prompts of each kind."""


def kinds_of_prompts(arguments: Arguments) -> dict[str, list[str]]:
    """The same prompts for every model: questions, requests, code, and text that quotes itself."""
    rows = [json.loads(line) for line in arguments.spec_bench.read_text().splitlines()]
    questions = [row["turns"][0] for row in rows if len(row["turns"][0]) < 400]
    with arguments.topv2.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    requests = [row["en_query"] + "\n" for row in rows]
    code = [json.loads(line)["prompt"] for line in arguments.code.read_text().splitlines()]
    for number, texts in enumerate((questions, requests)):
        random.Random(number).shuffle(texts)
    n, joined = arguments.prompts, "".join(code)
    pieces = [text[:QUOTED] for text in questions[n:] if len(text) > QUOTED][: n // 2]
    pieces += [joined[QUOTED * i : QUOTED * (i + 1)] for i in range(n - n // 2)]
    quoting = [f"{text}\n\n{text}\n\n{text[:12]}" for text in pieces]
    kinds = {"questions": questions, "requests": requests, "code": code, "quoting": quoting}
    return {kind: texts[:n] for kind, texts in kinds.items()}


def compare(file: Path) -> tuple[list[Sequence[str]], bool]:
    """The rows of a table, and whether auto keeps the limits."""
    lines = [json.loads(line) for line in file.read_text().splitlines()][1:]
    texts = seconds_of(lines)
    kinds, cells = sorted({kind for _, kind in texts}), {cell for cell, _ in texts}

    def columns(cell: Cell, kinds: Sequence[str]) -> list[np.ndarray]:
        return [column for kind in kinds for column in texts[cell, kind].T]

    (auto,) = (cell for cell in cells if cell.strategy == "auto")
    rows: list[Sequence[str]] = [HEADING]
    good = True
    for name, own in (("mixed", kinds), *((kind, [kind]) for kind in kinds)):
        best = max(cells - {auto}, key=lambda cell: speedup(*columns(cell, own), axis=0))
        static, ours = (
            from_samples(speedup, *columns(cell, own), of="texts") for cell in (best, auto)
        )
        over = from_samples(over_static, *columns(auto, own), *columns(best, own), of="texts")
        limit = MIXED if name == "mixed" else OF_STATIC
        good &= ours.value >= OF_PLAIN and over.value >= limit
        rows.append([name, f"{ours.text()}x", str(best), f"{static.text()}x", over.text()])
    return rows, good


def seconds_of(lines: Sequence[dict[str, Any]]) -> dict[tuple[Cell, str], np.ndarray]:
    """Seconds of the texts of a kind, by a setting and by autoregressive decoding beside it: two
    columns, in the order of the texts. Of repeats the median counts."""
    repeats = defaultdict(list)
    for one in lines:
        pair = one["decode_seconds"], one["base_seconds"]
        repeats[Cell.of(one), one["group"], one["id"]].append(pair)
    texts = defaultdict(list)
    for cell, kind, name in sorted(repeats, key=lambda place: place[2]):
        texts[cell, kind].append(np.median(repeats[cell, kind, name], axis=0))
    return {place: np.array(own) for place, own in texts.items()}


def speedup(*columns: np.ndarray, axis: int) -> np.ndarray:
    """The harmonic mean over kinds. columns: own and base seconds of the texts, kind by kind."""
    shares = [
        own.sum(axis) / base.sum(axis)
        for own, base in zip(columns[::2], columns[1::2], strict=True)
    ]
    return 1 / np.mean(shares, axis=0)


def over_static(*columns: np.ndarray, axis: int) -> np.ndarray:
    """Speedup of the first half of the columns over that of the second half."""
    half = len(columns) // 2
    return speedup(*columns[:half], axis=axis) / speedup(*columns[half:], axis=axis)


def main() -> int:
    """Writes the prompts, runs the benchmark, and compares."""
    at = sys.argv.index("--")
    arguments = tyro.cli(Arguments, args=sys.argv[1:at], description=__doc__)
    arguments.output.mkdir(parents=True, exist_ok=True)
    prompts = arguments.output / "prompts.jsonl"
    with prompts.open("w") as file:
        for kind, texts in kinds_of_prompts(arguments).items():
            for text in texts:
                print(json.dumps({"category": kind, "prompt": text}), file=file)
    own = ["--prompt-file", str(prompts), "--output", str(arguments.output)]
    code = command.main(["benchmark", *sys.argv[at + 1 :], *own])
    if code:
        return code
    rows, good = compare(arguments.output / "answers.jsonl")
    lines = [*table(rows), "", *table([("measured on", ""), *made_on().items()])]
    (arguments.output / TABLE).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
