"""Imports in the package point downward, and no file is too long."""

import runpy
from pathlib import Path

HOUSE = Path(__file__).parents[1] / "scripts" / "house.py"


def test_no_circle_no_import_upward_and_no_long_file(capsys):
    failed = runpy.run_path(str(HOUSE))["main"]()
    assert not failed, capsys.readouterr().out
