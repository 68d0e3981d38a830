"""Saves and restores the steps of a training run."""

import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from lsjax.checkpoints.run import best_first
from lsjax.checkpoints.steps import SavedStep, first_whole, log, orbax, saved_steps, to_save
from lsjax.checkpoints.tensors import CheckpointError, Report
from lsjax.config import AnyPath, CheckpointConfig, in_bucket
from lsjax.io.files import cause, remove_directory


class Restored(NamedTuple):
    """A restored run."""

    state: Any
    step: int
    data: dict[str, Any]  # position in the data


class KeptSteps:
    """Orbax's preservation policy: the newest steps, and the best ones by their held-out losses,
    which may come after the save. Orbax's own policies need the loss at save time."""

    def __init__(self, config: CheckpointConfig, losses: Mapping[int, float]):
        self._config, self._losses = config, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each step."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_first(steps, self._losses)[: self._config.keep_best]
        return [step in (*steps[-self._config.keep_last :], *best) for step in steps]


class Checkpoints(AbstractContextManager):
    """Saved steps of one run; a context manager that waits for the last save on exit.

    report: called with one line for each step that is damaged, or that could not be written while
    the run continues. losses: held-out loss by step, used to select the best steps; it may grow
    during the run.
    """

    def __init__(
        self,
        directory: AnyPath,
        config: CheckpointConfig,
        report: Report = log.warning,
        losses: Mapping[int, float] | None = None,
    ):
        self._directory, self._config, self._report = directory.absolute(), config, report
        self._losses = {} if losses is None else losses
        self._manager: Any = None
        self._begun = 0  # the last step whose save began, its bytes, its error if it failed at once
        self._bytes = 0
        self._failure: Exception | None = None

    def __exit__(self, error, *_) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the other hosts may have ended
        self.wait() if error is None else self.settle()
        if self._manager is not None:
            self._manager.close()

    def restore(self, like: Any, rest: Any = None) -> Restored | None:
        """The newest undamaged step; None if nothing has been saved yet.

        Newer, damaged steps are renamed, for example to 80.damaged, and will be saved again.

        like: the state's shapes (`jax.eval_shape`), with shardings if there is a mesh. rest: as in
        `SavedStep.read_state`.
        Raises CheckpointError if all steps are damaged, or saved shapes do not match.
        """

        def read(step: SavedStep) -> Restored:
            return Restored(step.read_state(like, rest), step.number, step.meta["data"])

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
        ocp = orbax()
        self.settle()
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=KeptSteps(self._config, self._losses),
                # Not after a failure: its threads may still be writing.
                cleanup_tmp_directories=not self._begun,
                save_root_metadata=False,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=wait_for_all),
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        if step in self._manager.all_steps():
            return
        self._begun, args = step, to_save(state, data)
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._failure = error
            if jax.process_count() > 1:
                self.wait()  # the others wait for this process until it ends

    def wait(self) -> None:
        """Waits until the last step is on disk; raises CheckpointError if the save failed, and
        JaxRuntimeError if another process has ended."""
        failure = self._finish()
        if failure is not None:
            origin = failure
            while origin.__cause__ is not None:
                origin = origin.__cause__
            if jax.process_count() > 1 and isinstance(origin, jax.errors.JaxRuntimeError):
                raise origin  # of a barrier
            newest = self.newest()
            then = f"resumes after step {newest}" if newest else "begins with the first step"
            fix = f", then run the same command again, which {then}"
            raise CheckpointError(self._unsaved(failure, fix)) from failure

    def settle(self) -> None:
        """`wait`, but a single process reports a failed save and continues."""
        if jax.process_count() > 1:
            self.wait()
            return
        failure = self._finish()
        if failure is not None:
            self._report(self._unsaved(failure, "; the run continues"))

    def newest(self) -> int:
        """The newest saved step; 0 without any."""
        return max((step.number for step in saved_steps(self._directory)), default=0)

    def _finish(self) -> Exception | None:
        """Waits for the last save; returns its error, after removing what it left."""
        if self._manager is None:
            return None
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
        return failure

    def _unsaved(self, failure: Exception, then: str) -> str:
        """One line with the space that the last save needs, and the fix."""
        return (
            f"step {self._begun} could not be saved: it needs {in_units(self._bytes)} in "
            f"{self._directory}{free_space(self._directory)}: make room there and check that it "
            f"is writable{then} ({cause(failure)})"
        )


def wait_for_all(*, key: str, timeout_ms: int) -> None:
    """Orbax's wait for all processes. A process whose save failed does not wait: it raises the
    error and ends, so the others end too. Otherwise they wait for each other for 20 minutes."""
    failure = sys.exc_info()[1]  # in a thread of orbax, which came here by `finally`
    if failure is not None and threading.current_thread() is not threading.main_thread():
        raise failure
    orbax().multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def in_units(size: int) -> str:
    """A number of bytes with a unit: 1.5 GB."""
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_space(directory: AnyPath) -> str:
    """The free space of a directory in words; empty if it is unknown, as in a bucket."""
    if in_bucket(directory) or not directory.is_dir():
        return ""
    return f", where {in_units(shutil.disk_usage(directory).free)} are free"
