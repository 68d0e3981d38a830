"""Chips and slices of them, as devices to compile for."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from lsjax.config import ConfigError, check
from lsjax.platforms import capability_of, shared_memory
from lsjax.training.profiling import peak_flops

GIB = 2**30
# Platform, which is also the extra of lsjax that installs its compiler -> packages, any of which
# has the compiler, and example slices.
COMPILERS = {
    "tpu": (("libtpu",), "v5e:8x8, v5p:4x4x4 or v6e:8x8"),
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "h100:8, a100:8, l4:1 or rtx4090:1"),
}
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling uses no chip, so two programs may compile at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Only errors, to stderr instead of files.
    "TPU_STDERR_LOG_LEVEL": "2",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Chip:
    """Figures of a chip; CHIPS names their sources."""

    name: str
    kind: str  # jax's device_kind
    hbm: int  # bytes of memory
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that all its links send, one way
    flops_per_cycle: int  # of its matrix units, bfloat16
    slice_bandwidth: float = 0.0  # bytes per second to other slices, or 0
    platform: str = "tpu"  # key of COMPILERS
    target: str = ""  # for GPUs, a description of the card: a GpuTargetConfigProto as text

    @property
    def peak_flops(self) -> float:
        """FLOPs per second, bfloat16."""
        return peak_flops(self.kind)

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak."""
        return self.peak_flops / self.flops_per_cycle


# A GpuTargetConfigProto. Sizes without a figure are those of all cards since Ampere.
TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} clock_rate_ghz: {ghz} fpus_per_core: {fpus} l2_cache_size: {l2}
  device_memory_size: {memory} memory_bandwidth: {bandwidth:.0f}
  shared_memory_per_core: {shared_of_core} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 threads_per_warp: 32 threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "{kind}"
"""


def card(
    *,
    name: str,
    kind: str,
    memory: int,
    bandwidth: float,
    link: float,
    cores: int,
    flops_per_core: int,
    ghz: float,
    l2_mib: int,
) -> Chip:
    """An NVIDIA card. cores: its multiprocessors. flops_per_core: of one in a cycle, bfloat16 with
    sums in float32. Figures that follow from the compute capability are those of the CUDA
    programming guide, "Technical Specifications per Compute Capability"."""
    capability = capability_of(kind)
    major, minor = str(capability).split(".")
    shared = shared_memory(capability)
    target = TARGET.format(
        kind=kind,
        major=major,
        minor=minor,
        cores=cores,
        ghz=ghz,
        fpus=64 if capability == 8.0 else 128,
        l2=l2_mib * 2**20,
        memory=memory,
        bandwidth=bandwidth,
        shared_of_core=shared + 1024,
        shared=shared,
        threads=1536 if capability in (8.6, 8.9) else 2048,
    )
    flops = cores * flops_per_core
    return Chip(name, kind, memory, bandwidth, link, flops, platform="cuda", target=target)


# TPUs: Google's Cloud TPU documentation. H100 and A100: NVIDIA's data sheets, SXM with NVLink.
# L4 and RTX 4090: NVIDIA's white paper on the Ada architecture, version 2.01; PCIe 4.0 x16.
CHIPS = (
    Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 200e9, 4 * 2 * 128**2, 3.125e9),
    Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 600e9, 8 * 2 * 128**2, 6.25e9),  # a device is two cores
    Chip("v6e", "TPU v6 lite", 32 * GIB, 1640e9, 400e9, 4 * 2 * 256**2, 12.5e9),
    card(
        name="h100",
        kind="NVIDIA H100",
        memory=80 * 10**9,
        bandwidth=3350e9,
        link=450e9,
        cores=132,
        flops_per_core=4096,
        ghz=1.98,
        l2_mib=50,
    ),
    card(
        name="a100",
        kind="NVIDIA A100",
        memory=80 * 10**9,
        bandwidth=2039e9,
        link=300e9,
        cores=108,
        flops_per_core=2048,
        ghz=1.41,
        l2_mib=40,
    ),
    card(
        name="l4",
        kind="NVIDIA L4",
        memory=24 * 10**9,
        bandwidth=300e9,
        link=32e9,
        cores=58,
        flops_per_core=1024,
        ghz=2.04,
        l2_mib=48,
    ),
    card(
        name="rtx4090",
        kind="NVIDIA GeForce RTX 4090",
        memory=24 * 10**9,
        bandwidth=1008e9,
        link=32e9,
        cores=128,
        flops_per_core=512,
        ghz=2.52,
        l2_mib=72,
    ),
)


def slice_size(topology: str) -> int:
    """Number of devices in a slice: 64 in "v5p:4x4x4"."""
    return math.prod(int(size) or 1 for size in re.findall(r"\d+", topology.partition(":")[2]))


def slice_of(topology: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice ("v5p:4x4x4", "h100:8"), which need not be present.

    slices: number of such slices. Raises ConfigError for an unknown slice, or if the chip's
    compiler is missing.
    """
    name, _, part = topology.partition(":")
    known = {chip.name: chip for chip in CHIPS}
    check(
        name in known,
        f"--topology {topology!r} names no known chip ({', '.join(known)}): "
        f"name a chip and a slice, such as {', '.join(slices for _, slices in COMPILERS.values())}",
    )
    chip = known[name]
    packages, examples = COMPILERS[chip.platform]
    check(
        any(map(importlib.util.find_spec, packages)),
        f"the compiler for {name} is missing: pip install 'lsjax[{chip.platform}]'",
    )
    unknown, advice = f"--topology {topology!r} is an unknown slice", f"use one such as {examples}"
    options: dict[str, Any] = {"topology_name": topology}
    if slices > 1:
        check(chip.slice_bandwidth > 0, f"mesh.slices {slices}: {name} has no slices, so use 1")
        options["num_slices"] = slices
    if chip.platform == "cuda":  # cards of one host
        check(re.fullmatch(r"[1-8]", part) is not None, f"{unknown}: {advice}")
        options = {"topology": f"1x1x{part}", "target_config": chip.target}
    else:
        os.environ.update(LIBTPU_ENVIRONMENT | os.environ)
        if slice_size(topology) == 1:  # on a host of its own, not on one of four
            options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(platform=chip.platform, **options)
    except JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ConfigError(f"{unknown} ({reason}): {advice}") from None
    return chip, list(found.devices)
