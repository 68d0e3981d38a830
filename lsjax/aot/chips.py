"""TPU chips and slices of them, as devices to compile for."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from lsjax.config import ConfigError, check
from lsjax.training.flops import device_peak

EXAMPLES = "name a chip and a slice of it, such as v5e:8x8, v5p:4x4x4 or v6e:8x8"
# What libtpu wants to know on a machine that is no TPU host.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling takes no chip, so two programs may do it at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Warnings of the partitioner, to stderr and not to files.
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Chip:
    """Google's figures of a chip (the Cloud TPU documentation, "System architecture")."""

    name: str
    kind: str  # jax's device_kind
    hbm: int  # bytes of memory
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that all its links send, one way
    flops_per_cycle: int  # of its matrix units, bfloat16

    @property
    def peak_flops(self) -> float:
        """FLOPs per second, bfloat16."""
        return device_peak(self.kind)

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak."""
        return self.peak_flops / self.flops_per_cycle


GIB = 2**30
CHIPS = (
    Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 200e9, 4 * 2 * 128**2),
    Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 600e9, 8 * 2 * 128**2),  # two cores as one device
    Chip("v6e", "TPU v6 lite", 32 * GIB, 1640e9, 400e9, 4 * 2 * 256**2),
)


def slice_of(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice ("v5p:4x4x4"), for `jax.make_mesh`; they need not be
    there.

    Raises ConfigError for what is no such slice, and without libtpu, the compiler for TPUs.
    """
    name = topology.partition(":")[0]
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    names = ", ".join(chip.name for chip in CHIPS)
    check(chip is not None, f"--topology {topology!r} is none of {names}: {EXAMPLES}")
    check(
        importlib.util.find_spec("libtpu") is not None,
        "the compiler for TPUs is missing: pip install 'lsjax[tpu]'",
    )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ConfigError(f"--topology {topology!r} is no slice ({reason}): {EXAMPLES}") from None
    return chip, list(found.devices)
