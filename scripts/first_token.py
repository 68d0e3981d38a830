"""Measures how long a user waits: from the start of decode.py to the first token of its text, and
to the end. With cold caches everything is compiled and rounds are timed.

    python scripts/first_token.py --model runs/quickstart [--repeats 3] [-- --strategy auto]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def wait(model: Path, prompt: str, cache: Path, options: list[str]) -> tuple[float, float]:
    """Seconds to the first new token and to the end."""
    command = [sys.executable, ROOT / "decode.py", "--model", model, "--prompt", prompt, *options]
    begin = time.monotonic()
    environment = os.environ | {"LSJAX_CACHE": str(cache)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        for _ in range(len(prompt.encode()) + 1):  # the prompt is printed first
            process.stdout.read(1)
        first = time.monotonic() - begin
        process.stdout.read()
    assert process.returncode == 0
    return first, time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a run with prompts.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("options", nargs="*", help="further flags of decode.py")
    arguments = parser.parse_args()
    line = (arguments.model / "prompts.jsonl").read_text().splitlines()[0]
    prompt = json.loads(line)["prompt"]
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rest = arguments.model, prompt, Path(folder), arguments.options
            found = {name: wait(*rest) for name in ("cold", "warm")}
        for name, (first, end) in found.items():
            print(f"{name}: first token {first:.1f} s, end {end:.1f} s", flush=True)


if __name__ == "__main__":
    main()
