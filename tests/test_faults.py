"""The faults of tests/proofs/faults.py can still be made."""

from pathlib import Path

import pytest

from tests.proofs.faults import FAULTS, Fault

PACKAGE = Path(__file__).parents[1] / "lsjax"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_changes_one_line(fault: Fault):
    assert (PACKAGE / fault.file).read_text(encoding="utf-8").count(fault.right) == 1
