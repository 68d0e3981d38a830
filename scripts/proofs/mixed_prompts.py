"""Is auto faster than every static setting, over four kinds of prompts?

    python scripts/proofs/mixed_prompts.py --spec-bench question.jsonl --topv2 topv2/test.tsv \\
        --code runs/quickstart/prompts.jsonl --output mixed -- --model runs/quickstart \\
        --strategies self_speculative auto --exit-layers 2 4 --num-draft-tokens 4 6 8 12 \\
        --draft-confidence 0 0.3 --new-tokens 128 --repeats 1

What follows `--` goes to `lsjax benchmark`, which runs all settings in turns and checks that all
texts are equal. The same command resumes. A speedup is the time of autoregressive decoding over
that of the setting, for all texts of a kind; of repeats the median counts. The kinds weigh the
same: the mixed speedup is the harmonic mean of theirs. Quartiles are those of the texts. Exits with
1 if auto is below a limit.
"""

import csv
import json
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from lsjax.cli import main as command
from lsjax.cli.show import table, wide_console
from lsjax.evaluation.scores import Cell

QUOTED = 170  # characters of a text that its prompt quotes
# Of the mixed set: at least this times the best static setting. Of each kind: likewise, and at
# least this times autoregressive decoding.
MIXED, OF_STATIC, OF_PLAIN = 1.08, 0.97, 0.97


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


def compare(file: Path) -> bool:
    """Prints speedups of each kind. Returns whether auto keeps the limits."""
    lines = [json.loads(line) for line in file.read_text().splitlines()][1:]
    found = defaultdict(list)  # own and base seconds of each repeat
    for one in lines:
        place = Cell.of(one), one["group"], one["id"]
        found[place].append((one["decode_seconds"], one["base_seconds"]))
    texts = defaultdict(list)  # medians of each text
    for (cell, kind, _), pairs in found.items():
        texts[cell, kind].append([statistics.median(each) for each in zip(*pairs, strict=True)])
    kinds, cells = sorted({kind for _, kind in texts}), {cell for cell, _ in texts}

    def speedup(cell: Cell, kinds: list[str]) -> float:
        sums = [map(sum, zip(*texts[cell, kind], strict=True)) for kind in kinds]
        return 1 / statistics.mean(own / base for own, base in sums)

    (auto,) = (cell for cell in cells if cell.strategy == "auto")
    rows, good = [], True
    for name, own in (("mixed", kinds), *((kind, [kind]) for kind in kinds)):
        best = max(cells - {auto}, key=lambda cell: speedup(cell, own))
        ours, static = speedup(auto, own), speedup(best, own)
        low, _, high = statistics.quantiles(b / a for kind in own for a, b in texts[auto, kind])
        good &= ours >= OF_PLAIN and ours >= static * (MIXED if name == "mixed" else OF_STATIC)
        words = [f"{static:.2f}", f"{ours:.2f}", f"{low:.2f} to {high:.2f}", f"{ours / static:.2f}"]
        rows.append([name, str(best), *words])
    names = ["kind", "best static setting", "its speedup", "auto", "quartiles", "auto over it"]
    wide_console().print(table("speedups", names, rows, left=2))
    return good


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
    return code or int(not compare(arguments.output / "answers.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
