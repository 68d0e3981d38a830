"""Injects the faults of fault_list.py into a copy of the source, one at a time, and runs the tests.

    python scripts/faults.py --output faults.jsonl
    python scripts/faults.py --likely-only --only "stale cache slot" "norms decay"

Each fault meets the test files that probably find it, up to the first failure. If they miss it, it
meets all other tests of `make test`, and then what takes long. Prints a line for each fault; exits
with 1 if any is missed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.fault_list import FAULTS, Fault  # noqa: E402

NOT_COPIED = (".git", ".*cache", ".venv*", "__pycache__", "build", "dist", "models", "runs")
LIKELY, OTHER, LONG = "likely", "other", "long"  # sets of tests, in this order


def main(
    *, only: tuple[str, ...] = (), output: Path | None = None, likely_only: bool = False
) -> int:
    """Injects the faults and prints which test finds each.

    Args:
        only: names of the faults to inject; all by default.
        output: JSON lines, one for each fault; those that it already has are not injected again.
        likely_only: skip all other tests for a fault that the likely ones miss.
    """
    if unknown := set(only) - {fault.name for fault in FAULTS}:
        sys.exit(f"no fault is called {', '.join(sorted(unknown))}: see scripts/fault_list.py")
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    before = [] if output is None or not output.exists() else output.read_text().splitlines()
    rows = [json.loads(line) for line in before]
    found = []
    for fault in chosen:
        row = known(fault, rows, likely_only)
        if row is None:
            row = measure(fault, likely_only)
            if output is not None:
                with output.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
        by = row["found_by"] or "MISSED"
        print(f"{fault.name}: {by} ({row['tests_run']}, {row['seconds']:.0f} s)", flush=True)
        found.append(row["tests_run"] if row["found_by"] else None)
    print(
        f"of {len(chosen)} faults, {found.count(LIKELY)} were found by their likely tests, "
        f"{found.count(OTHER)} by other tests of `make test`, {found.count(LONG)} by long tests, "
        f"{found.count(None)} were missed"
    )
    return int(None in found)


def known(fault: Fault, rows: Sequence[dict[str, Any]], likely_only: bool) -> dict[str, Any] | None:
    """The newest row that answers for the fault as it is now; None if it has to be injected."""
    same = [row for row in rows if asdict(fault).items() <= row.items()]
    enough = [row for row in same if row["found_by"] or likely_only or row["tests_run"] == LONG]
    return enough[-1] if enough else None


def measure(fault: Fault, likely_only: bool) -> dict[str, Any]:
    """Injects the fault; returns it with the test that found it, or None, and the seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lsjax"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        inject(fault, copy)
        files = fault.tests.split()
        # test_faults.py would find every fault: it looks for the right lines.
        done = [f"--ignore={file}" for file in ("tests/test_faults.py", *files)]
        sets = {LIKELY: (*files, "-m", "not long"), OTHER: (*done, "-n2", "-m", "not long")}
        sets[LONG] = ("-n2", "-m", "long")
        found_by, tests_run = None, LIKELY
        for name in (LIKELY,) if likely_only else sets:
            if found_by is None:
                found_by, tests_run = first_failure(copy, sets[name]), name
    seconds = round(time.monotonic() - begin, 1)
    return asdict(fault) | {"found_by": found_by, "tests_run": tests_run, "seconds": seconds}


def inject(fault: Fault, copy: Path) -> None:
    """Changes the fault's line in a copy of the repository."""
    source = copy / "lsjax" / fault.file
    text = source.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        sys.exit(f"{fault.name}: lsjax/{fault.file} does not contain its line once: correct it")
    source.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def first_failure(copy: Path, arguments: Sequence[str]) -> str | None:
    """The first test that fails in the copy; None if all pass."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not failures:
        sys.exit(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failures[0].partition(" - ")[0].split(" ", 1)[1]


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
