"""Results of a stage in a JSON file, written after every measurement so that a kill loses none.
Also makes the page docs/accelerators.md from these files."""

import json
import os
import shlex
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DECODING = (
    "Weights are random and every draft is right (an identity tail). The limit is the bytes of "
    "weights and of used cache over the measured bandwidth. The ideal speedup counts weights "
    "alone. `off` disables command buffers, `loops` extends them to loops and branches."
)
SECTIONS = {
    "a": "Equality\n\nTexts of each strategy compared with autoregressive decoding. A margin is "
    "by how much the best logit exceeds the other token's, where two texts first differ.",
    "b": f"Decoding, 1B\n\n{DECODING}",
    "b8": f"Decoding, 8B\n\n{DECODING}",
    "c": "Training, 1B\n\nUtilisation counts the FLOPs of the plain model. The peak is the "
    "device's own count, next to the compiler's plan for the step.",
    "d": "Quickstart\n\nThe programs of `make quickstart`, and the speed of the trained model.",
}


def read(output: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Results of each part of a stage; empty before it has run."""
    file = output / f"{stage}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def card() -> dict[str, str]:
    """Name and platform of the device. The call acquires the device."""
    import jax  # here: the page needs no jax

    device = jax.devices()[0]
    return dict(card=device.device_kind, platform=device.platform, jax=jax.__version__)


class PartResults:
    """Results of one part of a stage.

    deadline: seconds of `time.monotonic`. Measurements that would probably end later are skipped.
    """

    def __init__(self, output: Path, stage: str, part: str, deadline: float):
        self.output, self.stage, self.part, self.deadline = output, stage, part, deadline
        self.values: dict[str, Any] = {"rows": [], "left_out": [], "errors": []}
        self._longest = 0.0  # measurement so far, in seconds

    def put(self, **values: Any) -> None:
        """Adds fields and writes the file; the part's earlier results are overwritten."""
        self.values |= values
        known = read(self.output, self.stage) | {self.part: self.values}
        self.output.mkdir(parents=True, exist_ok=True)
        partial = self.output / f"{self.stage}.partial"
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(self.output / f"{self.stage}.json")

    def say(self, line: str) -> None:
        """Prints a line of progress."""
        print(f"{self.stage} {self.part}: {line}", flush=True)

    def start(self, card: Mapping[str, str], **settings: Any) -> None:
        """Records the device, the compiler's flags and the part's settings."""
        self.put(**card, flags=os.environ.get("XLA_FLAGS", ""), settings=settings)
        self.say(f"{card['card']} ({card['platform']}), jax {card['jax']}")

    def measure(self, name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Adds a row with the function's figures. Records an error, and returns an empty row."""
        began = time.monotonic()
        if began + self._longest > self.deadline:
            self.values["left_out"].append(name)
            self.say(f"{name}: skipped: out of time")
            self.put()
            return {}
        try:
            return self.row(name, function())
        except Exception as error:  # out of memory in one row says nothing about the others
            self.fail(name, error)
            return {}
        finally:
            self._longest = max(self._longest, time.monotonic() - began)

    def row(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Adds a row, prints it, and returns it."""
        self.values["rows"].append({"": name} | values)
        self.say(", ".join([name, *(f"{key} {shown(value)}" for key, value in values.items())]))
        self.put()
        return values

    def fail(self, name: str, error: BaseException | str) -> None:
        """Records an error and prints its first line."""
        line = (str(error).strip().splitlines() or [""])[0][:300]
        if isinstance(error, BaseException):
            line = f"{type(error).__name__}: {line}"
            self.values["traceback"] = "".join(traceback.format_exception(error))
        self.values["errors"].append(f"{name}: {line}")
        self.say(f"{name}: FAILED: {line}")
        self.put()


def shown(value: Any) -> str:
    """A figure as text, for the terminal and the page."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def write_page(output: Path, docs: Path) -> bool:
    """Writes the page to `docs`, or beside the results if some are from a CPU. Prints a line and
    returns False if there are no results."""
    stages = {stage: read(output, stage) for stage in SECTIONS}
    found = [part for stage in stages.values() for part in stage.values() if "card" in part]
    if not found:
        print(f"page: {output} has no results: run the stages first")
        return False
    on_cpus = any(part["platform"] == "cpu" for part in found)
    file = (output if on_cpus else docs) / "accelerators.md"
    cards = ", ".join(dict.fromkeys(part["card"] for part in found))
    blocks = ["# Accelerators", f"Measured on: {cards}. (This page is made by `make accelerator`.)"]
    for stage, parts in stages.items():
        blocks += [f"## {SECTIONS[stage]}"]
        blocks += [f"```sh\npython scripts/accelerator.py --stage {stage}\n```"]
        blocks += [] if parts else ["This stage was not run."]
        for name, part in parts.items():
            blocks += [f"### {name}", *_blocks(part)]
    file.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    print(f"page: wrote {file}")
    return True


def _blocks(part: Mapping[str, Any]) -> Sequence[str]:
    """Results of a part: its settings, its table, and the rows that are missing."""
    about = [part["card"], f"jax {part['jax']}"] if "card" in part else []
    about += [f"`XLA_FLAGS={shlex.quote(part['flags'])}`"] if part.get("flags") else []
    settings = part.get("settings", {})
    about += [f"{key.replace('_', ' ')} {shown(value)}" for key, value in settings.items()]
    blocks = [f"{', '.join(about)}."] if about else []
    if rows := part["rows"]:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[shown(row.get(key)) for key in columns] for row in rows]
        lines = [f"| {' | '.join(line)} |" for line in (columns, *cells)]
        blocks.append("\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]))
    if part["left_out"]:
        blocks.append(f"Left out for lack of time: {'; '.join(part['left_out'])}.")
    if part["errors"]:
        blocks.append("\n".join(f"- Failed: {error}" for error in part["errors"]))
    return blocks
