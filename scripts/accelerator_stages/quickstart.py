"""Stage d: the quickstart's configuration, by the programs and flags of the Makefile.

Needs all that lsjax depends on, as the programs have flags, a tokenizer and checkpoints.
"""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from accelerator_stages.report import Report, Row

ROOT = Path(__file__).parents[2]
NEEDED = ("tokenizers", "tyro", "rich", "orbax", "grain", "safetensors")
CARD = "import json; from accelerator_stages.report import card; print(json.dumps(card()))"
SHORT = "--num-steps 4 --optimizer.warmup-steps 1 --evaluation.batches 1 --evaluation.num-prompts 1"


def run(part: str, report: Report, tiny: bool) -> None:
    """Trains, decodes, checks the tokens and measures the speed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)}: this stage needs all of pyproject.toml")
    # In a process of its own, as this one must leave the device to the programs.
    asked = subprocess.run(
        [sys.executable, "-c", CARD], cwd=ROOT / "scripts", stdout=subprocess.PIPE
    )
    asked.check_returncode()
    report.start(json.loads(asked.stdout))
    work = (report.output / "quickstart").resolve()
    shutil.rmtree(work, ignore_errors=True)  # else training would go on from its checkpoint
    folder = shlex.quote(str(work))
    prompts = f"--model {folder} --prompt-file {folder}/prompts.jsonl"
    new, short = ("8", SHORT) if tiny else ("64", "")
    grid = f"{prompts} --num-draft-tokens 5"
    programs = {
        "train": f"train.py --config configs/quickstart.py --workdir {folder} {short}",
        "decode": f"decode.py {prompts} --max-new-tokens {new} --strategy self_speculative "
        "--exit-layer 4 --num-draft-tokens 5",
        "benchmark": f"-m lsjax.cli.benchmark {grid} --exit-layers 2 4 --new-tokens {new} "
        f"--repeats 1 --output {folder}/benchmark",
    }

    def timed(words: list[str]) -> Row:
        began = time.monotonic()
        # Ends before this process is ended, which would leave the program alone.
        rest = max(1.0, report.deadline - began - 20)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=rest)
        return {"seconds": time.monotonic() - began}

    for name, command in programs.items():
        report.say(f"python {command}")
        report.measure(name, partial(timed, shlex.split(command)))
    keys = ("tokens_per_second", "speedup", "acceptance_rate", "ideal", "share_of_ideal")
    cells = work / "benchmark" / "cells.jsonl"
    if cells.exists():
        for row in map(json.loads, cells.read_text().splitlines()):
            values = {key.replace("_", " "): row[key] for key in keys}
            report.row(f"{row['strategy']}, exit {row['exit_layer']}", values)
