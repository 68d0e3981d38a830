"""Saving a training run, and going on with it.

A step is written in the background, under another name until it is complete. What is on disk, and
how damage to it is found, is in saved_step.py.
"""

import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from lsjax.checkpoints.plain import from_named, named_leaves, nested
from lsjax.checkpoints.saved_step import (
    META,
    PARAMS,
    TRAIN,
    Report,
    SavedStep,
    bottom,
    described,
    first_good,
    log,
    one_error_is_enough,
    saved_steps,
    sealed,
)
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import CheckpointConfig, TrainConfig

_MODEL = "model."  # what names of parameters begin with in a state
_PACKAGES = ("lsjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Restored(NamedTuple):
    """A run as it was saved."""

    state: Any
    step: int
    data: dict[str, Any]  # position in the data


class Checkpoints:
    """The saved steps of one run. Leaving its context waits for the last one to be written, but
    after an error on one of several hosts does not: the others may have ended.

    A step that could not be written does not end a run of one process: the next one may find room
    again. Only where none follows is it an error.

    report: called with one line for each step that is damaged or could not be written. losses:
    held-out loss by step, of the steps that were evaluated; it may grow meanwhile. The best steps
    are kept by it.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        report: Report = log.warning,
        losses: Mapping[int, float] | None = None,
    ):
        self._directory, self._config, self._report = directory.absolute(), config, report
        self._losses = {} if losses is None else losses
        self._manager: Any = None
        self._quiet = ExitStack()
        self._clean = True  # of what a killed program left
        self._begun = 0  # the step that was saved last, and what went wrong with it at once
        self._failure: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(one_error_is_enough())
        return self

    def __exit__(self, error, *_) -> None:
        with self._quiet:
            if error is None:
                self.wait()
            elif jax.process_count() == 1:
                self.settle()
            else:
                return
            if self._manager is not None:
                self._manager.close()

    def restore(self, like: Any) -> Restored | None:
        """The newest step that is whole; None where nothing has been saved yet.

        Newer ones, which are damaged, are put aside as 80.damaged: they are saved anew.

        like: the state's shapes (`jax.eval_shape`), with shardings where there is a mesh.
        Raises CheckpointError where no step is whole, or what was saved is of another shape.
        """
        wanted = _items(named_leaves(like))

        def read(step: SavedStep) -> Restored:
            for item, leaves in wanted.items():
                strange = step.meta["arrays"][item].keys() - leaves.keys()
                if strange:
                    raise CheckpointError(
                        f"{step.directory / item}: {min(strange)} has no place in this run's "
                        "state: it is of another model or optimizer"
                    )
            params, train = (step.read(item, leaves) for item, leaves in wanted.items())
            leaves = {_MODEL + name: leaf for name, leaf in params.items()} | train
            return Restored(from_named(leaves, like), step.number, step.meta["data"])

        found = first_good(saved_steps(self._directory), read, self._report)
        if found is None:
            return None
        restored, damaged = found
        self._put_aside(damaged)
        return restored

    def save(
        self,
        state: Any,
        *,
        step: int,
        config: TrainConfig,
        data: Mapping[str, Any],
    ) -> None:
        """Begins to save the state after `step` steps; waits for the save before it, if that is
        still being written. Does nothing where this step is saved already.

        data: position in it, as JSON has it.
        Raises CheckpointError where one of several processes can't write: the others would wait for
        it.
        """
        self.settle()
        manager = self._open()
        if step in manager.all_steps():
            return
        import orbax.checkpoint as ocp

        items = _items(named_leaves(state))
        meta = {
            "config": asdict(config),
            "data": data,
            "arrays": described(items),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in _PACKAGES},
        }
        self._begun = step
        arrays = {item: ocp.args.StandardSave(nested(leaves)) for item, leaves in items.items()}
        args = ocp.args.Composite(**arrays, **{META: ocp.args.JsonSave(sealed(meta))})
        try:
            manager.save(step, args=args, force=True)
        except Exception as error:
            self._failure = error

    def wait(self) -> None:
        """Until the last step is on disk; raises CheckpointError where it can't be written."""
        if self._manager is None:
            return
        failure, self._failure = self._failure, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = failure or error
        if failure is not None:
            self._manager = None  # it would say so again
            self._clean = False
            # Orbax's threads may still be writing: what escapes this is removed at the next start.
            for left in self._directory.glob(f"{self._begun}.*-tmp"):
                shutil.rmtree(left, ignore_errors=True)
            raise CheckpointError(
                f"step {self._begun} could not be saved ({bottom(failure)}): make sure that "
                f"{self._directory} is yours and has room, or let checkpoints.keep_last be fewer"
            ) from failure

    def settle(self) -> None:
        """`wait`, but a single process reports a step that can't be written, and goes on."""
        try:
            self.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            self._report(str(error))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which of the steps to keep, in the order of their numbers."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if step in self._losses]
        best = sorted(scored, key=lambda step: (self._losses[step], -step))
        kept = {*steps[-self._config.keep_last :], *best[: self._config.keep_best]}
        return [step in kept for step in steps]

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=self._clean,
                save_root_metadata=False,
                lightweight_initialize=True,
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def _put_aside(self, damaged: Sequence[SavedStep]) -> None:
        if damaged and jax.process_index() == 0:
            for step in damaged:
                aside = step.directory.with_name(f"{step.number}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                step.directory.rename(aside)
        if damaged and jax.process_count() > 1:
            sync_global_devices("damaged steps are put aside")


def _items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Leaves of a state, parameters by themselves."""
    params = {
        name.removeprefix(_MODEL): leaf for name, leaf in leaves.items() if name.startswith(_MODEL)
    }
    train = {name: leaf for name, leaf in leaves.items() if not name.startswith(_MODEL)}
    return {PARAMS: params, TRAIN: train}
