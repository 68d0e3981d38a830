"""The saved steps of a training run, as they lie on disk: which there are, and whether they are
whole.

    checkpoints/80/params   parameters: plain nested dicts (plain.py), layers stacked
    checkpoints/80/train    optimizer state and counters, likewise
    checkpoints/80/meta     JSON: config, position in the data, fingerprints

A step is written under another name and renamed when it is complete, so a program that is killed
leaves no half of one. What happens to the files later is caught here: every array that is read is
compared with its fingerprint.
"""

import gc
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from lsjax.checkpoints.fingerprint import fingerprints
from lsjax.checkpoints.plain import nested, unnested
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config.json_form import VERSION, without_version

PARAMS, TRAIN, META = "params", "train", "meta"
T = TypeVar("T")
Report = Callable[[str], None]
log = logging.getLogger(__name__)


class DamagedStep(CheckpointError):
    """A saved step that is not what was written."""


def described(items: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    """Shape, dtype and fingerprint of each array of each item, for a step's meta."""
    return {
        item: {
            name: {
                "shape": list(leaves[name].shape),
                "dtype": leaves[name].dtype.name,
                "fingerprint": print_,
            }
            for name, print_ in fingerprints(leaves).items()
        }
        for item, leaves in items.items()
    }


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A step's meta as it is written: with a sum of its text, so that damage shows."""
    meta = json.loads(json.dumps({"version": VERSION, **meta}, allow_nan=False))
    return {"meta": meta, "sha256": _digest(meta)}


@dataclass(frozen=True)
class SavedStep:
    """One step on disk; nothing is read before it is asked for."""

    directory: Path

    @property
    def number(self) -> int:
        """Of the step: how many have been taken."""
        return int(self.directory.name)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What was saved beside the arrays; raises DamagedStep."""
        raw = self._restore(META, _read_json)
        good = isinstance(raw, dict) and raw.keys() == {"meta", "sha256"}
        if not good or _digest(raw["meta"]) != raw["sha256"]:
            raise DamagedStep(f"{self.directory / META}: is not what was written")
        return without_version(raw["meta"], str(self.directory / META))

    def read(self, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        """Arrays of an item by name, each as it was saved and where `wanted` has it (on the first
        device if it does not say).

        Raises CheckpointError where shape or dtype are others than were saved, DamagedStep where
        the step is not what was written; both name the array.
        """
        saved = self.meta["arrays"][item]
        for name, want in wanted.items():
            if name not in saved:
                raise CheckpointError(f"{self.directory / item}: has no array {name}")
            is_, asked = (tuple(saved[name]["shape"]), saved[name]["dtype"]), want.dtype.name
            if is_ != (want.shape, asked):
                raise CheckpointError(
                    f"{self.directory / item}: {name} is {is_[1]}{list(is_[0])}, but the config "
                    f"asks for {asked}{list(want.shape)}: it is of another model or run"
                )
        first = SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=want.sharding or first)
            for name, want in wanted.items()
        }
        arrays = self._restore(item, lambda ocp, path: _read_arrays(ocp, path, nested(targets)))
        for name, now in fingerprints(arrays).items():
            if now != saved[name]["fingerprint"]:
                raise DamagedStep(
                    f"{self.directory / item}: {name} is not what was written (its fingerprint is "
                    f"{now}, but was {saved[name]['fingerprint']})"
                )
        return arrays

    def _restore(self, item: str, read: Callable[[Any, Path], T]) -> T:
        """`read`, with whatever orbax raises as DamagedStep."""
        import orbax.checkpoint as ocp  # here: it takes a while, and few programs need it

        path = (self.directory / item).absolute()  # orbax reads no others
        if not path.is_dir():
            missing = f"has no {item}" if any(self.directory.iterdir()) else "is empty"
            raise DamagedStep(f"{self.directory}: {missing}")
        result, reason = None, ""
        with one_error_is_enough():
            try:
                result = read(ocp, path)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                reason = bottom(error)
            if reason:
                gc.collect()
                time.sleep(0.2)
        if jax.process_count() > 1 and not process_allgather(np.array(not reason)).all():
            reason = reason or "another host can't read its part"
        if reason:
            raise DamagedStep(f"{path}: cannot be read ({reason})")
        return result


def saved_steps(directory: Path) -> list[SavedStep]:
    """The steps in a directory of checkpoints, the newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    steps = [SavedStep(path) for path in found if re.fullmatch(r"\d+", path.name)]
    return sorted(steps, key=lambda step: step.number, reverse=True)


def best_first(steps: Iterable[SavedStep], losses: Mapping[int, float]) -> list[SavedStep]:
    """The steps that have a held-out loss, the lowest first, and of equal ones the newest.

    Raises CheckpointError where no step has one.
    """
    scored = [step for step in steps if step.number in losses]
    if not scored:
        raise CheckpointError("no saved step has a held-out loss: there is no best one yet")
    return sorted(scored, key=lambda step: (losses[step.number], -step.number))


def first_good(
    steps: Iterable[SavedStep], use: Callable[[SavedStep], T], report: Report = log.warning
) -> tuple[T, list[SavedStep]] | None:
    """What `use` makes of the first step that is whole, and the damaged ones before it; each of
    these is reported in one line. None if there are no steps at all.

    Raises CheckpointError where all are damaged.
    """
    damaged: list[SavedStep] = []
    reason = ""
    for step in steps:
        try:
            result = use(step)
        except DamagedStep as error:
            damaged.append(step)
            reason = str(error)
            report(f"step {step.number} is damaged and is left out: {reason}")
            continue
        return result, damaged
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} saved steps can be read; the last one tried: {reason}"
        )
    return None


def bottom(error: BaseException) -> str:
    """The first line of what was at the bottom of an error: storage names array, file and, at the
    end, what the system said."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"


@contextmanager
def one_error_is_enough() -> Iterator[None]:
    """Where one array can't be read or written, orbax drops its work on the others and logs every
    traceback, and Python would print the errors of what was dropped: they come when it is
    collected, or a moment later when it finds that nobody waits. What went wrong is raised too."""
    before = sys.unraisablehook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def hook(unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if not said.startswith(("Encountered error while reading", "Event loop is closed")):
            before(unraisable)

    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(_is_no_storage_error)
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(_is_no_storage_error)


def _is_no_storage_error(record: logging.LogRecord) -> bool:
    dropped = "never retrieved" in record.msg and (
        "async_serialize" in record.msg or "OCDBT database" in record.msg
    )
    return record.levelno < logging.ERROR or not (dropped or "orbax" in record.pathname)


def _digest(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _read_json(ocp: Any, path: Path) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path)


def _read_arrays(ocp: Any, path: Path, tree: Any) -> dict[str, Array]:
    args = ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(path, args=args)
    arrays = unnested(restored)
    for name, array in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct):  # orbax leaves the target in its place
            raise ValueError(f"array {name} is missing")
    return arrays
