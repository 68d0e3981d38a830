"""Are the drafts of a report counted right? Counts them from the JSON lines of decode.py.

    lsjax report --no-training --model RUN --temperature 0 --prompts 8 --output DIR
    python scripts/proofs/acceptance_count.py RUN DIR

decode.py writes the same texts, for each exit and draft length. A round appends its accepted drafts
and one more token, so a text's tokens, drafts and rounds must add up. Sums over the texts must
equal the report's counts at each position. Uses nothing of lsjax but decode.py's output. Exits with
1 on a difference.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

FIELDS = ("drafted_by_position", "accepted_by_position")


def main(model: str, directory: str) -> int:
    """Compares each exit and draft length; returns 1 on a difference."""
    _, *answers = map(json.loads, next(Path(directory).glob("answers-*.jsonl")).open())
    report = json.loads(Path(directory, "report.json").read_text())
    own = [one for one in report["models"][0]["answers"] if one["strategy"] == "self_speculative"]
    longest = max(one["num_new_tokens"] for one in report["models"][0]["answers"])
    prompts = list(dict.fromkeys(one["prompt"] for one in answers))
    settings = sorted({(one["exit_layer"], one["num_draft_tokens"]) for one in own})
    wrong = 0
    for exit_layer, drafts in settings:
        rows = [
            one
            for one in own
            if (one["exit_layer"], one["num_draft_tokens"]) == (exit_layer, drafts)
        ]
        expected = [summed(rows, name) for name in FIELDS]
        texts = decoded(model, prompts, exit_layer, drafts, longest)
        found = [summed(texts, name) for name in FIELDS]
        wrong += found != expected
        for one in texts:  # the first token comes from the prompt
            wrong += one["num_new_tokens"] != 1 + one["rounds"] + sum(one["accepted_by_position"])
        print(f"exit {exit_layer}, {drafts} drafts: {found[1]} of {found[0]}, report {expected[1]}")
    print(f"{wrong} differences in {len(settings)} settings, {len(prompts)} prompts")
    return int(wrong > 0)


def summed(rows: list[dict], name: str) -> list[int]:
    """Counts by position, over all rows."""
    total: dict[int, int] = defaultdict(int)
    for row in rows:
        for position, count in enumerate(row[name]):
            total[position] += count
    return [total[position] for position in sorted(total)]


def decoded(
    model: str, prompts: list[str], exit_layer: int, drafts: int, tokens: int
) -> list[dict]:
    """The JSON lines of decode.py."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "prompts.jsonl"), Path(folder, "found.jsonl")
        given.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        command = [sys.executable, "decode.py", "--model", model, "--prompt-file", str(given)]
        command += ["--strategy", "self_speculative", "--exit-layer", str(exit_layer)]
        command += ["--num-draft-tokens", str(drafts), "--max-new-tokens", str(tokens)]
        command += ["--json", str(found)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in found.open()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
