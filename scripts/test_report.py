"""Seconds and compilations of the tests, by file and by test.

    python scripts/test_report.py                     # all tests
    python scripts/test_report.py tests/decoding -x   # the arguments are pytest's
    python scripts/test_report.py --report build/tests.jsonl tests/model

Prints a row for each file and for the slowest tests: seconds, processor seconds, the seconds in
which jax traced, lowered and compiled, and the number of compiled programs. Programs from the
compilation cache count as compiled, but take little time. Child processes of a test count for its
seconds and its processor seconds only. --report also writes a line of JSON for each test.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.monitoring
import pytest

SLOWEST = 30  # tests that are shown
# Events of jax, and the fields that count their seconds.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


@dataclass
class Spent:
    """Figures of a test, or of all tests of a file. Fixtures belong to the first test with them."""

    seconds: float = 0.0
    processor: float = 0.0
    tracing: float = 0.0
    lowering: float = 0.0
    compiling: float = 0.0
    programs: int = 0
    tests: int = 0

    def add(self, other: "Spent") -> None:
        """Adds all figures of another one."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, name: str) -> str:
        """A line of the table."""
        seconds = (self.seconds, self.processor, self.tracing, self.lowering, self.compiling)
        figures = "".join(f"{value:>10.2f}" for value in seconds)
        return f"{figures}{self.programs:>10}{self.tests:>7}  {name}"


class Report:
    """A pytest plugin that counts what each test spends."""

    def __init__(self, file: Path | None):
        self.tests: dict[str, Spent] = {}
        self._file = file
        self._now = Spent()
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_) -> None:
        if event in EVENTS:
            name = EVENTS[event]
            setattr(self._now, name, getattr(self._now, name) + seconds)
            self._now.programs += name == "compiling"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Counts a test with its fixtures."""
        self._now = spent = self.tests[item.nodeid] = Spent(tests=1)
        before = sum(os.times()[:4])
        result = yield
        spent.processor = sum(os.times()[:4]) - before
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                print(json.dumps({"test": item.nodeid, **asdict(spent)}), file=lines)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds the seconds of setup, call or teardown."""
        self.tests[report.nodeid].seconds += report.duration


def main(arguments: list[str]) -> int:
    """Runs pytest, prints the tables, and returns pytest's exit code."""
    file = None
    if "--report" in arguments:
        at = arguments.index("--report")
        file = Path(arguments[at + 1])
        file.unlink(missing_ok=True)
        del arguments[at : at + 2]
    report = Report(file)
    code = pytest.main(["-q", *arguments], plugins=[report])
    files: dict[str, Spent] = defaultdict(Spent)
    total = Spent()
    for name, spent in report.tests.items():
        files[name.partition("::")[0]].add(spent)
        total.add(spent)
    slowest = sorted(report.tests.items(), key=lambda pair: -pair[1].seconds)[:SLOWEST]
    for rows in (sorted(files.items(), key=lambda pair: -pair[1].seconds), slowest):
        titles = ("seconds", "processor", "tracing", "lowering", "compiling", "programs")
        print("".join(f"{title:>10}" for title in titles) + "  tests")
        print("\n".join(spent.row(name) for name, spent in rows))
        print(total.row("all") + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
