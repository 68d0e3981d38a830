"""The page docs/accelerators.md, from the files that the stages have written."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerator_stages.report import Row, read, shown

TITLES = {
    "a": "Equality",
    "b": "Decoding, 1B",
    "b8": "Decoding, 8B",
    "c": "Training, 1B",
    "d": "Quickstart",
}
DECODING = (
    "Weights are random and every draft is right (an identity tail). The limit is the bytes of "
    "weights and of cache in use over the measured bandwidth. The ideal speedup counts weights "
    "alone. `off` is without command buffers, `loops` has loops and branches in them too."
)
TEXTS = {
    "a": "Texts of each strategy beside those of autoregressive decoding. A margin is by how much "
    "the best logit exceeds the other token's, where two texts first differ.",
    "b": DECODING,
    "b8": DECODING,
    "c": "Utilisation counts the FLOPs of the plain model. The peak is the device's own count, "
    "beside what the compiler has planned for the step.",
    "d": "The programs of `make quickstart`, and the speed of the trained model.",
}
ABOUT = ("card", "platform", "jax", "flags", "rows", "left_out", "errors", "traceback", "bandwidth")


def write(output: Path, file: Path, default: Path, parts: Mapping[str, Sequence[str]]) -> bool:
    """Writes the page; False, with a line that says why, where there is nothing to write."""
    stages = {stage: read(output, stage) for stage in parts}
    found = [part for stage in stages.values() for part in stage.values() if "card" in part]
    cards = list(dict.fromkeys(part["card"] for part in found))
    if not found:
        print(f"page: {output} has no results: run the stages first")
        return False
    if file.resolve() == default.resolve() and any(part["platform"] == "cpu" for part in found):
        print(f"page: some results are of a CPU: {file.name} is for accelerators; choose --page")
        return False
    lines = [
        "# Accelerators",
        "",
        f"Measured on: {', '.join(cards)}. (This page is made by `make accelerator`.)",
    ]
    for stage, results in stages.items():
        lines += ["", f"## {TITLES[stage]}", "", TEXTS[stage], ""]
        lines += ["```sh", f"python scripts/accelerator.py --stage {stage}", "```"]
        if not results:
            lines += ["", "This stage was not run."]
        for part in results:
            lines += ["", f"### {part}", "", *_part(results[part])]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"page: wrote {file}")
    return True


def _part(part: Row) -> list[str]:
    """Results of a part: its table, and the rows that are missing."""
    about = [f"{part[name]}" for name in ("card",) if name in part]
    about += [f"jax {part['jax']}"] if "jax" in part else []
    about += [f"`XLA_FLAGS={shlex.quote(part['flags'])}`"] if part.get("flags") else []
    about += [f"memory at {part['bandwidth'] / 1e9:.0f} GB/s"] if "bandwidth" in part else []
    about += [f"{key.replace('_', ' ')} {part[key]}" for key in part if key not in ABOUT]
    lines = [", ".join(about) + "."] if about else []
    if rows := part.get("rows"):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(shown(row.get(key)) for key in columns)} |" for row in rows]
    if part.get("left_out"):
        lines += ["", f"Left out for lack of time: {'; '.join(part['left_out'])}."]
    if part.get("errors"):
        lines += ["", *(f"- Failed: {error}" for error in part["errors"])]
    return lines
