"""The layout of the package stays within its limits."""

import runpy
from pathlib import Path

HOUSE = Path(__file__).parents[1] / "scripts" / "house.py"


def test_no_circle_no_import_upward_and_all_within_the_limits(capsys):
    failed = runpy.run_path(str(HOUSE))["main"]()
    assert not failed, capsys.readouterr().out
