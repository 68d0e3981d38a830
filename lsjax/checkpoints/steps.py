"""Saved steps of a training run on disk, and detection of damaged ones.

    checkpoints/80/params   parameters by their path in the model, layers stacked
    checkpoints/80/train    the rest of the training state by its path
    checkpoints/80/meta     JSON: position in the data, fingerprints

Orbax renames a step when it is complete, so a kill never leaves a partial step. Buckets cannot
rename, so there it writes a MARKER last. Storage has no checksum for array values, so each array is
saved with a `fingerprint`.
"""

import gc
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt32

from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import Path, in_bucket
from lsjax.config.checked import without_version

PARAMS, TRAIN, META = "params", "train", "meta"
MARKER = "commit_success.txt"
T = TypeVar("T")
Report = Callable[[str], None]
log = logging.getLogger(__name__)


class DamagedStep(CheckpointError):
    """A saved step that has changed since it was written."""


@dataclass(frozen=True)
class SavedStep:
    """One step on disk, loaded lazily."""

    directory: Path

    @property
    def number(self) -> int:
        """Number of steps taken."""
        return int(self.directory.name)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Metadata saved beside the arrays.

        Raises DamagedStep, or ConfigError if another version of lsjax saved the step.
        """
        return without_version(self._load(META, _read_meta), f"{self.directory / META}")

    def read(self, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """Arrays of an item by path, with the sharding in `wanted`, or on the first device.

        Raises CheckpointError for another shape or dtype, and DamagedStep; both name the array.
        """
        where, saved = self.directory / item, self.meta["arrays"][item]
        for name, want in wanted.items():
            found = "{dtype}{shape}".format(**saved[name]) if name in saved else "missing"
            asked = f"{want.dtype.name}{list(want.shape)}"
            if found != asked:
                raise CheckpointError(
                    f"{where}: {name} is {found}, but the config expects {asked}: it "
                    "belongs to another model or run"
                )
        first = SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=want.sharding or first)
            for name, want in wanted.items()
        }
        arrays = self._load(item, lambda path: _read_arrays(path, targets))
        for name, now in fingerprints(arrays).items():
            if now != saved[name]["fingerprint"]:
                raise DamagedStep(
                    f"{where}: {name} has changed since it was saved (its fingerprint is {now}, "
                    f"but was {saved[name]['fingerprint']})"
                )
        return arrays

    def check_names(self, item: str, known: Iterable[str]) -> None:
        """Raises CheckpointError if a saved array is not among these names."""
        if extra := sorted(self.meta["arrays"][item].keys() - known):
            raise CheckpointError(
                f"{self.directory / item}: {extra[0]} has no place in this model or optimizer: the "
                "config belongs to another run"
            )

    def _load(self, item: str, read: Callable[[Path], T]) -> T:
        """Runs `read`, and turns storage errors into DamagedStep on every host."""
        path = (self.directory / item).absolute()  # orbax requires absolute paths
        result, reason = None, ""
        with quiet_storage():
            try:
                result = read(path)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                reason = cause(error) if path.is_dir() else "is missing"
            if reason:  # let the other arrays' readers end before logging resumes
                gc.collect()
                time.sleep(0.2)
                gc.collect()
        if jax.process_count() > 1 and not process_allgather(np.array(not reason)).all():
            reason = reason or "another host cannot read its part"
        if reason:
            raise DamagedStep(f"{path}: cannot be read ({reason})")
        return result


def saved_steps(directory: Path) -> list[SavedStep]:
    """Steps in a directory of checkpoints, newest first."""
    try:
        found = [path for path in directory.iterdir() if path.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [SavedStep(path) for path in found if not in_bucket(path) or (path / MARKER).exists()]
    return sorted(steps, key=lambda step: step.number, reverse=True)


def first_whole(
    steps: Iterable[SavedStep], use: Callable[[SavedStep], T], report: Report = log.warning
) -> tuple[T, list[SavedStep]]:
    """Result of `use` for the first undamaged step, and the damaged steps before it.

    report: called with one line per damaged step. Raises CheckpointError if all are damaged.
    """
    damaged, reason = [], ""
    for step in steps:
        try:
            return use(step), damaged
        except DamagedStep as error:
            damaged.append(step)
            reason = str(error)
            report(f"step {step.number} is damaged and skipped: {reason}")
    raise CheckpointError(
        f"none of the {len(damaged)} saved steps can be read; the last one tried: {reason}"
    )


def sealed(meta: Any) -> dict[str, Any]:
    """A step's metadata as written, with a hash of its text that reveals damage."""
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    return {"meta": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


@contextmanager
def quiet_storage() -> Iterator[None]:
    """Hides orbax's logs and warnings about abandoned tasks; the raised error is enough."""
    before, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]

    def hook(unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if not said.startswith(("Encountered error while reading", "Event loop is closed")):
            before(unraisable)

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        return record.name != "asyncio" and "orbax" not in record.pathname

    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(is_from_elsewhere)
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(is_from_elsewhere)


def cause(error: BaseException) -> str:
    """First line of the innermost error, in which storage names array, file and problem."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"


def _read_meta(path: Path) -> dict[str, Any]:
    raw = json.loads((path / "metadata").read_bytes())
    if raw != sealed(raw["meta"]):
        raise ValueError("it has changed since it was saved")
    return raw["meta"]


def _read_arrays(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    import orbax.checkpoint as ocp  # slow to import, and few programs need it

    placed = ocp.checkpoint_utils.construct_restore_args(dict(targets))
    with ocp.PyTreeCheckpointer() as reader:
        arrays = reader.restore(path, item=dict(targets), restore_args=placed, partial_restore=True)
    for name, array in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct):  # orbax returns the target of a missing array
            raise ValueError(f"array {name} is missing")
    return arrays


@jax.jit
def fingerprint(x: Array) -> UInt32[Array, ""]:
    """Sum over all elements of mix(bits + c * position) mod 2^32, positions in row-major order.

    `mix` is a bijection on 32 bits (the finaliser of MurmurHash3, Appleby, 2011). So one changed
    element always shows; several are missed with probability 2^-32. Integer sums have no order, so
    every mesh gives the same result. An element of 64 bits counts as two.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + index * jnp.uint32(stride)
    bits = bits + position * jnp.uint32(0x9E3779B9)  # odd, so that all positions differ
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint of each array, as eight hexadecimal digits."""
    numbers = jax.device_get([fingerprint(jnp.asarray(leaf)) for leaf in leaves.values()])
    return {name: f"{int(number):08x}" for name, number in zip(leaves, numbers, strict=True)}
