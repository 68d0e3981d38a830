"""What is known of the chips."""

import pytest

from lsjax.aot.chips import CHIPS, Chip, slice_size

CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "h100": 1.83e9}
CLOCKS |= {"a100": 1.41e9, "l4": 2.04e9, "rtx4090": 2.52e9}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_clocks(chip: Chip):
    """Peak over FLOPs a cycle is a clock that such a chip may have."""
    assert chip.clock == pytest.approx(CLOCKS[chip.name], rel=0.01)


@pytest.mark.parametrize("topology, size", [("v5p:4x4x4", 64), ("h100:8", 8), ("v5e:2x2", 4)])
def test_sizes_of_slices(topology, size):
    assert slice_size(topology) == size
