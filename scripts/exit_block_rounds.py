"""What a round of drafts from an exit block costs, and the acceptance from which it pays.

    python scripts/exit_block_rounds.py --directory build/exit_block_rounds

Compiles for slices and reads the reports of `lsjax aot`. Needs libtpu and the CUDA plugin, but
neither a TPU nor a GPU. Existing reports are reused. A round of d drafts writes 1 + a + ... + a^d
tokens on average, if each draft is right with the chance a. It pays once these take less time than
as many tokens of autoregressive decoding. Times are "without overlap", for one row.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from pods import is_report, print_row

MODELS = {
    "1B, 16 layers": "configs/continual_llama3_2_1b.py",
    "8B, 32 layers": "configs/continual_llama3_8b.py",
}
TOPOLOGIES = ("v5e:2x2", "h100:1")
COLUMNS = ("model", "slice", "exit", "drafts", "GB of a round", "of a token", "ms of a round")
COLUMNS += ("of a token", "pays from", "tokens a round at 0.7", "speedup at 0.7")
SOME = 0.7  # acceptance of the last columns


@dataclass(frozen=True)
class Arguments:
    """The rounds to compile."""

    directory: Path = Path("build/exit_block_rounds")
    """Folder of the reports."""
    exits: tuple[int, ...] = (2, 4, 8)
    """Exits with a block."""
    drafts: int = 4
    """Draft tokens of a round."""


def main(arguments: Arguments) -> int:
    """Prints a row for each round."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    print_row(COLUMNS, head=True)
    for model, config in MODELS.items():
        for topology in TOPOLOGIES:
            token = figures(arguments, config, topology, "--decoding.strategy autoregressive")
            for exit_layer in arguments.exits:
                flags = "--decoding.strategy self_speculative --decoding.exit-blocks "
                flags += f"--decoding.exit-layer {exit_layer} "
                flags += f"--decoding.num-draft-tokens {arguments.drafts}"
                found = figures(arguments, config, topology, flags)
                cost = found["serial_seconds"] / token["serial_seconds"]
                cells = [model, topology, str(exit_layer), str(arguments.drafts)]
                cells += [f"{one['moved_bytes'] / 1e9:.2f}" for one in (found, token)]
                cells += [f"{1e3 * one['serial_seconds']:.2f}" for one in (found, token)]
                tokens = tokens_of_round(SOME, arguments.drafts)
                least = least_acceptance(cost, arguments.drafts)
                print_row([*cells, f"{least:.2f}", f"{tokens:.2f}", f"{tokens / cost:.2f}x"])
    return 0


def figures(arguments: Arguments, config: str, topology: str, flags: str) -> dict:
    """The report of a program."""
    words = "".join(letter if letter.isalnum() else "_" for letter in config + topology + flags)
    file = arguments.directory / f"{words}.json"
    if not is_report(file):
        command = f"{sys.executable} -m lsjax aot --config {config} --topology {topology} "
        command += f"--programs decode {flags} --output {file}"
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())["programs"][0]


def tokens_of_round(acceptance: float, drafts: int) -> float:
    """Tokens of a round on average: the accepted drafts before the first wrong one, and one."""
    return sum(acceptance**number for number in range(drafts + 1))


def least_acceptance(cost: float, drafts: int) -> float:
    """The acceptance at which a round writes as many tokens as it costs. cost: in tokens."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_of_round(middle, drafts) > cost else (middle, high)
    return high


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
