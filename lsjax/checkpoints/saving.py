"""Saves and restores a training run with orbax, in the background; steps.py detects damage."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Array

from lsjax.checkpoints.steps import (
    META,
    PARAMS,
    TRAIN,
    Report,
    SavedStep,
    cause,
    fingerprints,
    first_whole,
    log,
    quiet_storage,
    saved_steps,
    sealed,
)
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import CheckpointConfig, Path
from lsjax.config.checked import VERSION
from lsjax.data.files import remove_directory
from lsjax.model.parameters import named_leaves

_MODEL = "model."  # prefix of parameter paths in a state


class Restored(NamedTuple):
    """A restored run."""

    state: Any
    step: int
    data: dict[str, Any]  # position in the data


class Checkpoints:
    """Saved steps of one run; a context manager that waits for the last save on exit.

    A single process continues after a failed save, except that of the last step.

    report: called with one line for each step that is damaged or could not be written. losses:
    held-out loss by step, used to select the best steps; it may grow during the run.
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
        self._begun = 0  # the last step whose save began, and its error if it failed at once
        self._failure: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(quiet_storage())
        return self

    def __exit__(self, error, *_) -> None:
        with self._quiet:
            if error is None:
                self.wait()
            elif jax.process_count() == 1:
                self.settle()
            else:
                return  # the other hosts may have ended
            if self._manager is not None:
                self._manager.close()

    def restore(self, like: Any) -> Restored | None:
        """The newest undamaged step; None if nothing has been saved yet.

        Newer, damaged steps are renamed, for example to 80.damaged, and will be saved again.

        like: the state's shapes (`jax.eval_shape`), with shardings if there is a mesh.
        Raises CheckpointError if all steps are damaged, or saved shapes do not match.
        """

        def read(step: SavedStep) -> Restored:
            arrays: dict[str, Array] = {}
            for item, leaves in _items(like).items():
                step.check_names(item, leaves)
                arrays |= step.read(item, leaves)
            leaves = [arrays[path.removeprefix(_MODEL)] for path in named_leaves(like)]
            state = jax.tree.unflatten(jax.tree.structure(like), leaves)
            return Restored(state, step.number, step.meta["data"])

        steps = saved_steps(self._directory)
        if not steps:
            return None
        restored, damaged = first_whole(steps, read, self._report)
        for step in damaged if jax.process_index() == 0 else ():
            aside = step.directory.with_name(f"{step.number}.damaged")
            remove_directory(aside)
            step.directory.rename(aside)
        if damaged and jax.process_count() > 1:
            sync_global_devices("damaged steps are renamed")
        return restored

    def save(self, state: Any, *, step: int, data: Mapping[str, Any]) -> None:
        """Waits for the last save, then begins to save the state after `step` steps, if unsaved.

        data: JSON-serialisable position in the data.
        """
        import orbax.checkpoint as ocp

        self.settle()
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                # Not after a failure: its threads may still be writing.
                cleanup_tmp_directories=not self._begun,
                save_root_metadata=False,
                lightweight_initialize=True,
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        if step in self._manager.all_steps():
            return
        self._begun = step
        arrays, args = {}, {}
        for item, leaves in _items(state).items():
            args[item], found = ocp.args.StandardSave(leaves), fingerprints(leaves)
            arrays[item] = {
                name: {"shape": leaf.shape, "dtype": leaf.dtype.name, "fingerprint": found[name]}
                for name, leaf in leaves.items()
            }
        meta = sealed({"version": VERSION, "data": data, "arrays": arrays})
        args[META] = ocp.args.JsonSave(meta)
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            self._failure = error

    def wait(self) -> None:
        """Waits until the last step is on disk; raises CheckpointError if the save failed."""
        if self._manager is None:
            return
        failure, self._failure = self._failure, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = failure or error
        if failure is not None:
            self._manager = None  # it would raise again
            # The next start removes files that orbax's threads write after this.
            for left in self._directory.glob(f"{self._begun}.*-tmp"):
                remove_directory(left)
            raise CheckpointError(
                f"step {self._begun} could not be saved ({cause(failure)}): check that "
                f"{self._directory} is writable and has free space, or lower checkpoints.keep_last"
            ) from failure

    def settle(self) -> None:
        """`wait`, but a single process reports a failed save and continues."""
        try:
            self.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            self._report(str(error))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax callback: which steps to keep. Its own policies need the loss at save time."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = best_first([step for step in steps if step in self._losses], self._losses)
        kept = {*steps[-self._config.keep_last :], *scored[: self._config.keep_best]}
        return [step in kept for step in steps]


def best_first(steps: Iterable[int], losses: Mapping[int, float]) -> list[int]:
    """Steps sorted by held-out loss, ties newest first."""
    return sorted(steps, key=lambda step: (losses[step], -step))


def _items(state: Any) -> dict[str, dict[str, Any]]:
    """Leaves of a state by path; model leaves are separate."""
    items: dict[str, dict[str, Any]] = {PARAMS: {}, TRAIN: {}}
    for path, leaf in named_leaves(state).items():
        items[PARAMS if path.startswith(_MODEL) else TRAIN][path.removeprefix(_MODEL)] = leaf
    return items
