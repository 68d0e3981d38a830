"""What is known of the chips."""

import pytest

from lsjax.aot.chips import CHIPS, Chip

CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_clocks(chip: Chip):
    """Peak over FLOPs a cycle is a clock that such a chip may have."""
    assert chip.clock == pytest.approx(CLOCKS[chip.name], rel=0.01)
