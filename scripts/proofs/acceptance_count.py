"""Are the drafts of a report counted right? Counts them from the JSON lines of decode.py.

    python scripts/proofs/acceptance_count.py RUN DIRECTORY

RUN is a finished training, such as runs/quickstart. Its prompts become a task, so that prompts are
texts, which both programs read alike. The report and decode.py write the same greedy texts, for
each exit and draft length. Sums over the texts must equal the report's counts at each position. A
round appends its accepted drafts and one more token, so tokens, drafts and rounds of a text must
add up. Uses nothing of lsjax but its output. Exits with 1 on a difference.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

NEW_TOKENS = 64
LSJAX = [sys.executable, "-m", "lsjax"]
SETTING = ("exit_layer", "num_draft_tokens", "draft_vocab")
FIELDS = ("drafted_by_position", "accepted_by_position")


def main(model: str, directory: str) -> int:
    """Compares each exit and draft length; returns 1 on a difference."""
    prompts = [row["prompt"] for row in lines_of(Path(model, "prompts.jsonl"))]
    files = Path(directory, "train.jsonl"), Path(directory, "validation.jsonl")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, own in zip(files, (["unused"], prompts), strict=True):
        rows = (json.dumps({"prompt": one, "response": "pass"}) for one in own)
        file.write_text("\n".join(rows))
    command = [*LSJAX, "report", "--no-training", "--model", model, "--output", directory]
    command += ["--task", "pairs", "--prompts", str(len(prompts)), "--new-tokens", str(NEW_TOKENS)]
    command += ["--data.paths", str(files[0]), "--data.validation-paths", str(files[1])]
    subprocess.run([*command, "--num-draft-tokens", "3", "5"], check=True)
    report = json.loads(Path(directory, "report.json").read_text())
    own = [one for one in report["models"][0]["answers"] if one["strategy"] == "self_speculative"]
    settings = dict.fromkeys(tuple(one[name] for name in SETTING) for one in own)
    wrong = 0
    for setting in settings:
        rows = [one for one in own if tuple(one[name] for name in SETTING) == setting]
        expected = [summed(rows, name) for name in FIELDS]
        texts = decoded(model, prompts, *setting)
        found = [summed(texts, name) for name in FIELDS]
        wrong += found != expected
        for one in texts:  # the first token comes from the prompt
            wrong += one["num_new_tokens"] != 1 + one["rounds"] + sum(one["accepted_by_position"])
        exit_layer, drafts, vocab = setting
        named = f"exit {exit_layer}, {drafts} drafts, vocabulary {vocab or 'all'}"
        print(f"{named}: {found[1]} of {found[0]}, report {expected[1]}")
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
    model: str, prompts: list[str], exit_layer: int, drafts: int, vocab: int | None
) -> list[dict]:
    """The JSON lines of decode.py."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "prompts.jsonl"), Path(folder, "found.jsonl")
        given.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        command = [sys.executable, "decode.py", "--model", model, "--prompt-file", str(given)]
        command += ["--strategy", "self_speculative", "--exit-layer", str(exit_layer)]
        command += ["--num-draft-tokens", str(drafts), "--max-new-tokens", str(NEW_TOKENS)]
        command += ["--draft-vocab", str(vocab)] if vocab else []
        command += ["--json", str(found)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return lines_of(found)


def lines_of(file: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
