"""The faults of scripts/fault_list.py can be injected, and a resumed script skips what it knows."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scripts import faults
from scripts.fault_list import FAULTS, Fault

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_changes_one_line(fault: Fault):
    assert (ROOT / "lsjax" / fault.file).read_text(encoding="utf-8").count(fault.right) == 1
    assert all((ROOT / file).is_file() for file in fault.tests.split())


def test_there_are_sixty_faults_with_different_names_and_lines():
    assert len(FAULTS) == 60
    assert len({fault.name for fault in FAULTS}) == 60
    assert len({fault.right for fault in FAULTS}) == 60


def test_what_is_known_is_not_injected_again(monkeypatch, tmp_path, capsys):
    injected = []

    def measure(fault: Fault, likely_only: bool):
        injected.append(fault.name)
        found = fault != FAULTS[1]
        run = faults.LIKELY if found or likely_only else faults.LONG
        by = "tests/a.py::test_b" if found else None
        return asdict(fault) | {"found_by": by, "tests_run": run, "seconds": 1.0}

    monkeypatch.setattr(faults, "measure", measure)
    first, second = FAULTS[0].name, FAULTS[1].name
    arguments = dict(only=(first, second), output=tmp_path / "faults.jsonl")
    assert faults.main(**arguments, likely_only=True) == 1
    assert injected == [first, second]
    assert f"{second}: MISSED" in capsys.readouterr().out
    # All other tests are still to be run for the second one, once.
    for _ in range(2):
        assert faults.main(**arguments) == 1
        assert injected == [first, second, second]
    # A fault that has changed since is injected again.
    monkeypatch.setattr(faults, "FAULTS", (replace(FAULTS[0], wrong="other"), FAULTS[1]))
    assert faults.main(**arguments | dict(only=(first,))) == 0
    assert injected[3:] == [first]
