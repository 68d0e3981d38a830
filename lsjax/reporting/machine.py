"""What a report says of the machine and the versions that made it."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

PACKAGES = ("lsjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
COMMIT = "commit"  # a key of `made_on`
# Instructions of x86 processors, widest first, by the names that Linux gives them.
VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def machine_name() -> str:
    """The devices, and for CPUs the processor: AMD EPYC, 2 cores, AVX-512 with bfloat16."""
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform != "cpu":
        return f"{count} x {kind}"
    fields = processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [fields.get("model name") or platform.processor() or platform.machine()]
    parts.append(f"{cores} core{'s' * (cores != 1)}")
    parts += [name for flag, name in VECTORS.items() if has(flag)][:1]
    if "xla_cpu_max_isa" in (given := os.environ.get("XLA_FLAGS", "")):
        parts.append(f"XLA_FLAGS={given.strip()}")
    if count > 1:
        parts.append(f"{count} devices")
    return ", ".join(parts)


def processor() -> dict[str, str]:
    """What Linux says of the last core; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = (line.partition(":")[::2] for line in lines)
    return {name.strip(): value.strip() for name, value in pairs}


def has(flag: str) -> bool:
    """Whether the processor has these instructions and XLA may use them. A limit is AVX2."""
    limited = "xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", "")
    return flag in processor().get("flags", "").split() and (flag == "avx2" or not limited)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 trains faster: on accelerators and on processors that multiply it."""
    return jax.default_backend() != "cpu" or has("avx512_bf16") or has("amx_bf16")


def versions() -> str:
    """Python and the packages that the figures depend on."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def made_on() -> dict[str, str]:
    """When, where and by which code a figure is made."""
    made = {"date": f"{date.today()}", "machine": machine_name(), "versions": versions()}
    return made | ({COMMIT: commit()} if commit() else {})


def commit() -> str:
    """Commit of the checkout that runs, with a + if files of the package differ from it. Empty for
    an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    ask = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*ask, "rev-parse", "--short=9", "HEAD"], capture_output=True)
        changes = subprocess.run([*ask, "status", "--porcelain", "lsjax"], capture_output=True)
    except OSError:  # git is not installed
        return ""
    return head.stdout.decode().strip() + "+" * bool(changes.stdout)
