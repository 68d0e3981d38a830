"""A report that is killed again and again ends as one that nothing disturbed, timings aside.

    python scripts/proofs/report_kills.py --directory build/report_kills

Kills `lsjax report` with SIGKILL at random moments after its plan was made, and starts it again.
Compares report.json with that of an undisturbed report. What depends on measured seconds is left
out: seconds themselves, and what auto chose. Exits with 1 if anything else differs.
"""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

REPORT = "--config quickstart --model.num-layers 4 --num-steps 120 --checkpoints.every 20 "
REPORT += "--evaluation.every 60 --prompts 6 --new-tokens 32 --num-draft-tokens 2 4"
# Of report.json: measured seconds, and what depends on them or on the time of day.
LEFT_OUT = {"date", "command", "training_seconds", "decode_seconds", "base_seconds"}
LEFT_OUT |= {"compile_seconds", "prefill_seconds", "tokens_per_second", "answer"}


@dataclass(frozen=True)
class Arguments:
    """What to kill."""

    directory: Path = Path("build/report_kills")
    """Folder of both reports."""
    kills: int = 10
    """Number of kills."""
    longest: float = 25.0
    """Most seconds from a start to a kill."""
    seed: int = 0
    """Seed of the moments."""


def main(arguments: Arguments) -> int:
    """Makes both reports and prints the differences."""
    moments = random.Random(arguments.seed)
    whole, killed = arguments.directory / "whole", arguments.directory / "killed"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    kills = 0
    while kills < arguments.kills:
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL)
        while not (killed / "plan.json").exists():
            time.sleep(0.5)
        try:
            process.wait(moments.uniform(2.0, arguments.longest))
            print("it ended before its kill", flush=True)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            done = sorted(file.name for file in killed.iterdir())
            print(f"kill {kills}, with {', '.join(done)}", flush=True)
    subprocess.run(command(killed), check=True, stdout=subprocess.DEVNULL)
    found = (json.loads((one / "report.json").read_text()) for one in (whole, killed))
    differing = list(differences(*map(without_seconds, found)))
    for place in differing[:20]:
        print(f"differs: {place}")
    print(f"{kills} kills; {len(differing)} differences")
    return int(bool(differing))


def command(output: Path) -> list[str]:
    """The command that makes or resumes a report."""
    return [sys.executable, "-m", "lsjax", "report", *REPORT.split(), "--output", str(output)]


def without_seconds(value: Any) -> Any:
    """The JSON value without what depends on seconds."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in LEFT_OUT}
    if isinstance(value, list):
        return [without_seconds(one) for one in value if not is_auto(one)]
    return value


def is_auto(value: Any) -> bool:
    """Whether this is an answer of auto."""
    return isinstance(value, dict) and value.get("strategy") == "auto"


def differences(one: Any, other: Any, place: str = "report") -> list[str]:
    """Places where two JSON values differ."""
    if type(one) is not type(other):
        return [place]
    if isinstance(one, dict):
        keys = {**one, **other}
        pairs = ((f"{place}.{key}", one.get(key), other.get(key)) for key in keys)
    elif isinstance(one, list) and len(one) == len(other):
        pairs = ((f"{place}[{n}]", *both) for n, both in enumerate(zip(one, other, strict=True)))
    else:
        return [] if one == other else [place]
    return [found for place, a, b in pairs for found in differences(a, b, place)]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
