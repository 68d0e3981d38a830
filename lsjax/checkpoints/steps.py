"""Saved steps of a training run: on disk, and detection of damage.

    checkpoints/80/params   parameters by their path in the model, layers stacked; of a model with
                            exit blocks, which alone are trained, only these
    checkpoints/80/train    the rest of the training state by its path
    checkpoints/80/meta     JSON: position in the data, fingerprints

Orbax renames a step when it is complete, so a kill never leaves a partial step. Buckets cannot
rename, so there it writes a MARKER last. Storage has no checksum for array values, so each array is
saved with a `fingerprint`.
"""

import hashlib
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt32

from lsjax.checkpoints.tensors import CheckpointError, Report
from lsjax.config import AnyPath, in_bucket
from lsjax.config.checked import VERSION, without_version
from lsjax.io.files import cause
from lsjax.model.parameters import named_leaves

PARAMS, TRAIN, META = "params", "train", "meta"
_MODEL = "model."  # prefix of parameter paths in a state
EXIT_BLOCKS = "exit_blocks."  # and of those of exit blocks
MARKER = "commit_success.txt"
# Counts in the state of AdamW, and what version 0.1 saved. Its schedule counted the run's steps.
EARLIER_PATHS = {"opt_state.1.count": "opt_state.0.count", "opt_state.3.count": "step"}
EARLIER_ADAMW = {*EARLIER_PATHS.values()}
T = TypeVar("T")
log = logging.getLogger(__name__)


class DamagedStep(CheckpointError):
    """A saved step that has changed since it was written."""


@dataclass(frozen=True)
class SavedStep:
    """One step on disk, loaded lazily."""

    directory: AnyPath

    @property
    def number(self) -> int:
        """Number of steps taken."""
        return int(self.directory.name)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Metadata of the arrays. Raises DamagedStep, or ConfigError for another version's step."""
        return without_version(self._load(META, _read_meta), f"{self.directory / META}")

    def check(self, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Raises CheckpointError unless exactly these arrays of an item were saved."""
        saved = self.meta["arrays"][item]
        for name in {**wanted, **saved}:
            found = "{dtype}{shape}".format(**saved[name]) if name in saved else "missing"
            want = wanted.get(name)
            asked = f"{want.dtype.name}{list(want.shape)}" if name in wanted else "no such array"
            if found != asked:
                raise CheckpointError(
                    f"{self.directory / item}: {name} is {found}, but the config expects {asked}: "
                    "it belongs to another model, optimizer or run"
                )

    def read(self, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """Arrays of an item by path, with the sharding in `wanted`, or on the first device.

        Raises DamagedStep, which names the array.
        """
        arrays = self._load(item, lambda path: _read_arrays(path, wanted))
        for name, now in fingerprints(arrays).items():
            before = self.meta["arrays"][item][name]["fingerprint"]
            if now != before:
                raise DamagedStep(
                    f"{self.directory / item}: {name} has changed since it was saved (its "
                    f"fingerprint is {now}, but was {before})"
                )
        return arrays

    def read_state(self, like: Any, rest: Any = None) -> Any:
        """Training state with the shapes and shardings of `like`. rest: a state with the arrays
        that are not saved. Raises as `check` and `read`."""
        arrays = {}
        for item, leaves in items_of(like).items():
            names = self._saved_names(item, leaves)
            wanted = {names[path]: leaf for path, leaf in leaves.items()}
            self.check(item, wanted)
            found = self.read(item, wanted)
            for path, name in names.items():
                # Those of step and schedule of 0.1 are one, but a training step donates both.
                shared = path != name and name in names
                arrays[path] = jnp.copy(found[name]) if shared else found[name]
        others = {} if rest is None else named_leaves(rest)
        leaves = [
            arrays.get(path.removeprefix(_MODEL), others.get(path)) for path in named_leaves(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _saved_names(self, item: str, paths: Iterable[str]) -> dict[str, str]:
        """The saved name of each array: another one if version 0.1 saved the state of AdamW."""
        saved, paths = self.meta["arrays"][item], [*paths]
        if not EARLIER_ADAMW <= saved.keys() or not {*EARLIER_PATHS} <= {*paths}:
            return {path: path for path in paths}
        earlier = [path.replace("opt_state.1.", "opt_state.0.") for path in paths]
        earlier = [EARLIER_PATHS.get(path, name) for path, name in zip(paths, earlier, strict=True)]
        return dict(zip(paths, earlier, strict=True))

    def _load(self, item: str, read: Callable[[AnyPath], T]) -> T:
        """Runs `read`, and turns storage errors into DamagedStep on every host."""
        path = (self.directory / item).absolute()  # orbax requires absolute paths
        result, reason = None, ""
        try:
            result = read(path)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = cause(error) if path.is_dir() else "is missing"
        if jax.process_count() > 1 and not process_allgather(np.array(not reason)).all():
            reason = reason or "another host cannot read its part"
        if reason:
            raise DamagedStep(f"{path}: cannot be read ({reason})")
        return result


def saved_steps(directory: AnyPath) -> list[SavedStep]:
    """Steps in a directory of checkpoints, newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdecimal()]
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
    raise CheckpointError(f"none of the {len(damaged)} saved steps can be read; the last: {reason}")


def items_of(state: Any) -> dict[str, dict[str, Any]]:
    """Leaves of a training state by item and path, as they are saved."""
    items: dict[str, dict[str, Any]] = {PARAMS: {}, TRAIN: {}}
    leaves = named_leaves(state)
    blocks = {path for path in leaves if path.startswith(_MODEL + EXIT_BLOCKS)}
    for path, leaf in leaves.items():
        if not path.startswith(_MODEL):
            items[TRAIN][path] = leaf
        elif not blocks or path in blocks:
            items[PARAMS][path.removeprefix(_MODEL)] = leaf
    return items


def to_save(state: Any, data: Mapping[str, Any]) -> Any:
    """Arguments with which orbax saves a training state and its position in the data."""
    arrays, args = {}, {}
    for item, leaves in items_of(state).items():
        args[item], found = orbax().args.StandardSave(leaves), fingerprints(leaves)
        arrays[item] = {
            name: {"shape": leaf.shape, "dtype": leaf.dtype.name, "fingerprint": found[name]}
            for name, leaf in leaves.items()
        }
    meta = sealed({"version": VERSION, "data": data, "arrays": arrays})
    return orbax().args.Composite(**args, meta=orbax().args.JsonSave(meta))


def sealed(meta: Any) -> dict[str, Any]:
    """A step's metadata as written, with a hash of its text that reveals damage."""
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    return {"meta": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


@cache
def orbax() -> Any:
    """The orbax package, slow to import; its logs are hidden, because the raised errors suffice."""
    import orbax.checkpoint as ocp

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        said = f"{record.pathname} {record.getMessage()}"
        return not re.search("orbax|ocdbt|tensorstore", said, re.IGNORECASE)

    # Of readers and writers that orbax drops when another one fails.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = partial(_show_others, sys.unraisablehook)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_from_elsewhere)
    return ocp


def _show_others(show: Callable[[Any], None], unraisable: Any) -> None:
    """Shows an error that nothing can catch, unless a dropped reader or writer raised it."""
    said = str(unraisable.exc_value)
    if not said.startswith(("Encountered error while", "Event loop is closed")):
        show(unraisable)


def _read_meta(path: AnyPath) -> dict[str, Any]:
    raw = json.loads((path / "metadata").read_bytes())
    if raw != sealed(raw["meta"]):
        raise ValueError("it has changed since it was saved")
    return raw["meta"]


def _read_arrays(path: AnyPath, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    first = SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=want.sharding or first)
        for name, want in wanted.items()
    }
    placed = orbax().checkpoint_utils.construct_restore_args(targets)
    with orbax().PyTreeCheckpointer() as reader:
        arrays = reader.restore(path, item=targets, restore_args=placed, partial_restore=True)
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
