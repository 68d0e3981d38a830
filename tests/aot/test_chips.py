"""What is known of the chips."""

import pytest

from lsjax.aot.chips import CHIPS, Chip


@pytest.mark.parametrize(
    "chip, clock", zip(CHIPS, (1.5e9, 1.75e9, 1.75e9), strict=True), ids=lambda one: str(one)[:20]
)
def test_clocks(chip: Chip, clock: float):
    """Peak over FLOPs a cycle is the clock that Google gives or, for v6e, a likely one."""
    assert chip.clock == pytest.approx(clock, rel=0.01)
