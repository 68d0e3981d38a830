"""How the devices are laid out."""

import dataclasses
import math
from dataclasses import dataclass

from lsjax.config.errors import check


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; -1 on one of them is what the others leave of the devices.

    One device by default. What each axis shares out is in lsjax/sharding.py.
    """

    data: int = 1
    """Devices that share out the rows of a batch."""
    fsdp: int = 1
    """Devices that share out the weights along the model's width, and in training the rows too."""
    tensor: int = 1
    """Devices that share out heads, feed-forward channels and vocabulary."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on a machine of that many devices; those beyond the mesh stay idle.

        Raises ConfigError where a size is none, the devices do not suffice, or a -1 does not
        come out even.
        """
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            check(
                size == -1 or size >= 1,
                f"mesh.{name} {size} is not a size: choose 1 or more, or -1 for all that is left",
            )
        rest = [name for name, size in sizes.items() if size == -1]
        check(
            len(rest) <= 1,
            f"mesh.{' and mesh.'.join(rest)} are -1: leave the rest to one of them only",
        )
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        check(
            fixed <= num_devices,
            f"a mesh of {asked} needs {fixed} devices, but there are {num_devices}: "
            "choose smaller --mesh sizes",
        )
        check(
            not rest or num_devices % fixed == 0,
            f"a mesh of {asked} does not fit {num_devices} devices: {fixed} does not divide them",
        )
        return sizes | dict.fromkeys(rest, num_devices // fixed)
