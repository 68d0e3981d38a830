"""Compiles rounds of many rows for chips, and draws their speedups beside measured ones.

    python scripts/many_rows.py
    python scripts/many_rows.py --picture docs/many_rows.png \\
        --measured "SmolLM2-135M, 2 CPU cores" build/rows/rows.jsonl

`lsjax benchmark --rows` measures. Needs libtpu and the CUDA plugin
(pip install 'lsjax[tpu]' 'lsjax[cuda]'), but neither a TPU nor a GPU. Existing reports in the
directory are reused. Times are "without overlap".
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from pods import is_report

from lsjax.cli.show import show_costs
from lsjax.evaluation.many_rows import RoundCost
from lsjax.evaluation.speed_plots import plot_rows

CONFIG, NAME = "configs/continual_llama3_8b.py", "Llama-3 8B"
TOPOLOGIES = ("v5e:2x2", "h100:1")
ROWS = (1, 8, 32, 64)
LENGTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Arguments:
    """What to draw."""

    directory: Path = Path("build/many_rows")
    """Folder of the reports."""
    measured: tuple[str, Path] | None = None
    """Name of a machine, and the rows.jsonl that was measured there."""
    picture: Path | None = None
    """Draws the picture to this file."""


def main(arguments: Arguments) -> int:
    """Prints a table for each machine. Returns 1 if a program could not be compiled."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    costs = {f"{NAME}, {one}": of_chip(arguments.directory, one) for one in TOPOLOGIES}
    if not all(costs.values()):
        return 1
    if arguments.measured is not None:
        name, file = arguments.measured
        costs[name] = [RoundCost(**json.loads(line)) for line in file.read_text().splitlines()]
    for name, own in costs.items():
        show_costs(name, own)
    if arguments.picture is not None:
        plot_rows(costs, arguments.picture, title="Self-speculative decoding of many rows")
    return 0


def of_chip(directory: Path, topology: str) -> list[RoundCost]:
    """Costs on a chip; none if a program could not be compiled."""
    token = seconds_by_rows(directory, topology, "autoregressive")
    costs = []
    for drafts in LENGTHS if token else ():
        flags = ("--decoding.num-draft-tokens", str(drafts))
        found = seconds_by_rows(directory, topology, "self_speculative", *flags)
        for rows, (exit_layer, seconds) in found.items():
            costs.append(RoundCost(rows, exit_layer, drafts, token[rows][1], seconds))
    return sorted(costs, key=lambda cost: cost.rows)


def seconds_by_rows(
    directory: Path, topology: str, strategy: str, *flags: str
) -> dict[int, tuple[int, float]]:
    """Exit and seconds of a round, by its number of rows; none if it could not be compiled."""
    name = "_".join([topology.replace(":", "_"), strategy, *flags[1:]])
    file = directory / f"{name}.json"
    if not is_report(file):
        command = [sys.executable, "-m", "lsjax", "aot", "--config", CONFIG]
        command += ["--topology", topology, "--programs", "decode", "--output", str(file)]
        command += ["--decoding.strategy", strategy, *flags]
        command += ["--decoding.batch-size", *map(str, ROWS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not is_report(file):
            print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr)
            return {}
    found = {}
    for program in json.loads(file.read_text())["programs"]:
        kind = program["round"]
        found[kind["rows"]] = kind["exit_layer"], program["serial_seconds"]
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
