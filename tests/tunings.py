"""Other tunings for this machine's programs."""

from dataclasses import replace
from typing import Any

import pytest

from lsjax.platforms import TUNINGS


def tune(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Changes fields of the tuning for CPUs."""
    monkeypatch.setitem(TUNINGS, "cpu", replace(TUNINGS["cpu"], **changes))
