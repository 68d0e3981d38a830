"""What the traced program is compiled for, and whether it uses the code that is tuned for it.

`platform` and `nvidia_capability` are facts. `tuned_for` is what tuned code asks. It is the
platform too, unless the setting `kernels` is "reference": then no form is tuned for it.
"""

import math
from contextlib import AbstractContextManager

import jax

from lsjax.config import Kernels

# Compute capabilities for ahead-of-time compilation, where JAX knows only the device's name.
CAPABILITIES = {
    "NVIDIA A100": 8.0,
    "NVIDIA H100": 9.0,
    "NVIDIA H200": 9.0,
    "NVIDIA L4": 8.9,
    "NVIDIA GeForce RTX 4090": 8.9,
}
# KiB of shared memory for a block of threads, by compute capability (CUDA programming guide,
# "Technical Specifications per Compute Capability"). Unlisted cards get the least of these.
SHARED_KIB = {8.0: 163, 8.6: 99, 8.9: 99, 9.0: 227, 10.0: 227, 10.3: 227, 12.0: 99, 12.1: 99}
REFERENCE = "reference"
# The setting of the programs that are traced in this thread. It is part of the key of JAX's caches,
# so a program that was traced under the other setting is never returned.
_kernels = jax.make_user_context("auto")


def platform() -> str:
    """Platform of the program that is being traced: "cpu", "gpu" or "tpu". The current mesh
    decides, whose devices may be abstract; without a mesh, this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def with_kernels(kernels: Kernels) -> AbstractContextManager:
    """Context in which programs are traced, gradients included. "reference": without tuned code."""
    return _kernels(kernels)


def tuned_for() -> str:
    """Platform that the traced program is tuned for, or "reference" for none."""
    return REFERENCE if _kernels.value == REFERENCE else platform()


def nvidia_capability() -> float:
    """Compute capability of the NVIDIA GPUs that the traced program targets; 0 for others."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    local = jax.local_devices()
    kind = local[0].device_kind if device is None else device.device_kind
    here = next((one for one in local if one.device_kind == kind), None)
    try:
        return float(here.compute_capability)
    except (AttributeError, ValueError):  # another kind of device, or not on this machine
        return capability_of(kind)


def capability_of(kind: str) -> float:
    """Compute capability of a card by JAX's name for it; 0 for unknown names."""
    return next((value for name, value in CAPABILITIES.items() if kind.startswith(name)), 0.0)


def shared_memory(capability: float) -> int | float:
    """Bytes of shared memory that a block of threads may use on a card. Capability 0 is no card:
    kernels are interpreted, without a limit."""
    kib = SHARED_KIB.get(capability, min(SHARED_KIB.values()))
    return 1024 * kib if capability else math.inf
