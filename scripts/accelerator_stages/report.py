"""Results of a stage in a JSON file, written after every measurement, so that a kill loses none."""

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(output: Path, stage: str) -> dict[str, Row]:
    """What is known of each part of a stage; empty before it has run."""
    file = output / f"{stage}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def card() -> Row:
    """Name and platform of the device; takes the device, as any use of it does."""
    import jax

    device = jax.devices()[0]
    return dict(card=device.device_kind, platform=device.platform, jax=jax.__version__)


class Report:
    """One part of a stage.

    deadline: in seconds of `time.monotonic`; no measurement begins that would probably end later.
    """

    def __init__(self, output: Path, stage: str, part: str, deadline: float):
        self.output, self.stage, self.part, self.deadline = output, stage, part, deadline
        self.values: Row = {"rows": [], "left_out": [], "errors": []}
        self._longest = 0.0  # measurement so far, in seconds

    def put(self, **values: Any) -> None:
        """Adds fields and writes the file."""
        self.values |= values
        known = read(self.output, self.stage) | {self.part: self.values}
        self.output.mkdir(parents=True, exist_ok=True)
        partial = self.output / f"{self.stage}.partial"
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(self.output / f"{self.stage}.json")

    def say(self, line: str) -> None:
        """Prints a line of progress."""
        print(f"{self.stage} {self.part}: {line}", flush=True)

    def start(self, card: Row, **about: Any) -> None:
        """Notes the device (`card`) and the flags; earlier results of the part are overwritten."""
        self.put(**card, flags=os.environ.get("XLA_FLAGS", ""), **about)
        self.say(f"{card['card']} ({card['platform']}), jax {card['jax']}")

    def measure(self, name: str, function: Callable[[], Row]) -> Row:
        """A row with what the function measures. An error is noted and the next row goes on."""
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

    def row(self, name: str, values: Row) -> Row:
        """Adds a row, prints it, and gives it back."""
        self.values["rows"].append({"": name} | values)
        self.say(", ".join([name, *(f"{key} {shown(value)}" for key, value in values.items())]))
        self.put()
        return values

    def fail(self, name: str, error: BaseException | str) -> None:
        """Notes an error and prints its first line."""
        line = (str(error).strip().splitlines() or [""])[0][:300]
        if isinstance(error, BaseException):
            line = f"{type(error).__name__}: {line}"
            self.values["traceback"] = "".join(traceback.format_exception(error))
        self.values["errors"].append(f"{name}: {line}")
        self.say(f"{name}: FAILED: {line}")
        self.put()


def shown(value: Any) -> str:
    """A figure as it is printed and as the page has it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
