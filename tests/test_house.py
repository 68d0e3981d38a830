"""The rules of the layout, which scripts/house.py checks."""

import runpy
from pathlib import Path

HOUSE = Path(__file__).parents[1] / "scripts" / "house.py"


def test_no_rule_is_broken(capsys):
    failed = runpy.run_path(str(HOUSE))["main"]()
    assert not failed, capsys.readouterr().out
