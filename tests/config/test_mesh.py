"""Sizes of a mesh's axes, and what is said of sizes that cannot be."""

import pytest

from lsjax.config import ConfigError, MeshConfig

NAMES = ("data", "fsdp", "context", "tensor")


@pytest.mark.parametrize(
    "config, devices, sizes",
    [
        (MeshConfig(), 8, (1, 1, 1, 1)),
        (MeshConfig(data=4, tensor=2), 8, (4, 1, 1, 2)),
        (MeshConfig(data=-1, context=2), 8, (4, 1, 2, 1)),
        (MeshConfig(fsdp=-1), 6, (1, 6, 1, 1)),
        (MeshConfig(data=8, tensor=-1), 8, (8, 1, 1, 1)),
        (MeshConfig(tensor=3), 8, (1, 1, 1, 3)),
        (MeshConfig(slices=2, tensor=2), 8, (2, 1, 1, 2)),
        (MeshConfig(slices=2, data=2, fsdp=-1), 16, (4, 4, 1, 1)),
        (MeshConfig(slices=4, data=-1), 8, (8, 1, 1, 1)),
    ],
)
def test_sizes(config, devices, sizes):
    assert config.sizes(devices) == dict(zip(NAMES, sizes, strict=True))


@pytest.mark.parametrize(
    "sizes, devices, message",
    [
        (dict(data=0), 8, "mesh.data 0 is not a size: choose 1 or more, or -1"),
        (dict(tensor=-2), 8, "mesh.tensor -2 is not a size"),
        (dict(data=-1, fsdp=-1), 8, "mesh.data and mesh.fsdp are -1"),
        (dict(data=4, tensor=4), 8, "data 4 x tensor 4 needs 16 devices, but there are 8"),
        (dict(data=-1, tensor=16), 8, "tensor 16 needs a multiple of 16 devices, but there are 8"),
        (dict(slices=3), 8, "slices 3 needs a multiple of 3 devices, but there are 8"),
        (dict(slices=2, fsdp=8), 8, "fsdp 8 x slices 2 needs a multiple of 16 devices, but"),
        (dict(slices=2, data=-1, tensor=3), 8, "x slices 2 needs a multiple of 6 devices"),
        (dict(data=-1, tensor=3), 8, "data -1 x tensor 3 needs a multiple of 3 devices"),
    ],
)
def test_sizes_that_cannot_be(sizes, devices, message):
    with pytest.raises(ConfigError, match=message) as error:
        MeshConfig(**sizes).sizes(devices)
    assert "\n" not in str(error.value)
