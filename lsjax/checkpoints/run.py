"""The directory of a training run: begins it, and loads it as a model.

config.json     the run's configuration, with the model's shape (lsjax/config/checked.py)
tokenizer.*     the tokenizer's files, and generation_config.json if there is one
token_counts.json, prompts.jsonl        for decoding (lsjax/training/prepare.py)
recipe.json     the functions that the run was given (lsjax/training/recipe.py)
metrics.jsonl   one line of metrics for each logged step
checkpoints/    the saved steps (steps.py, saving.py)
writer.lock     of the trainer that writes there (lock.py)
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from lsjax.checkpoints.narrowing import Change
from lsjax.checkpoints.steps import PARAMS, SavedStep, first_whole, saved_steps
from lsjax.checkpoints.tensors import NOT_FINITE, CheckpointError, Track
from lsjax.config import AnyPath, LlamaConfig, LoraConfig, TrainConfig, check
from lsjax.config.checked import from_json, versioned, without_version
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.io.files import read_json, write_json
from lsjax.io.rows import json_rows
from lsjax.model.llama import Llama
from lsjax.model.lora import merged
from lsjax.model.parameters import adapter_paths, named_leaves, sharding_of, stacked_path

CONFIG, CHECKPOINTS, METRICS = "config.json", "checkpoints", "metrics.jsonl"
RECIPE = "recipe.json"
EVALUATION = "evaluation"  # kind of the METRICS rows with held-out losses
REJECTED = "rejected_drafts"  # of such a row in runs of exit blocks: 1 - agreement, their mean


def is_run(directory: AnyPath) -> bool:
    """Whether a training run has begun in this directory."""
    file = directory / CONFIG
    return file.is_file() and {"version", "model"} <= read_json(file, CheckpointError).keys()


def begin_run(directory: AnyPath, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the first files of a run, config.json last; a resumed run may change that one.

    Raises ConfigError if the directory holds another model. Also raises it if the tokenizer does
    not match the model, the run or the initial model.
    """
    rows = config.model.vocab_size
    size = tokenizer.fitted(rows).vocab_size
    check(
        rows < 2 * size,
        f"the tokenizer has {size} tokens, but the model's vocabulary is {rows}: choose another "
        "data.tokenizer, or set model.vocab_size (a little more than the tokenizer has is fine)",
    )
    begun = (directory / CONFIG).exists()
    check(not begun or is_run(directory), f"{directory} holds another model: choose a new one")
    same = _has_tokenizer(directory, tokenizer) if begun else None
    check(
        same is not False,
        f"{directory} was begun with another tokenizer than data.tokenizer is now: its training "
        "data or Python has changed, so begin a new run in a new directory",
    )
    if config.init_from and not saved_steps(directory / CHECKPOINTS):
        check(
            _has_tokenizer(config.init_from, tokenizer) is not False,
            f"data.tokenizer is not the one of {config.init_from}, whose table has other tokens in "
            f"the same rows: set data.tokenizer to {config.init_from}",
        )
    if not same:
        tokenizer.save(directory)
    write_json(directory / CONFIG, versioned(config))


def _has_tokenizer(model: str | AnyPath, tokenizer: Tokenizer) -> bool | None:
    """Whether a model's tokenizer equals this one; None if it has no readable tokenizer."""
    try:
        return load_tokenizer(model).fingerprint == tokenizer.fingerprint
    except TokenizerError:
        return None


def read_run_config(directory: AnyPath) -> TrainConfig:
    """The run's configuration. Raises ConfigError if the directory holds no run."""
    return from_json(TrainConfig, _fields(directory / CONFIG), str(directory / CONFIG))


def _fields(file: AnyPath) -> dict[str, Any]:
    return without_version(read_json(file, CheckpointError), str(file))


def read_recipe(directory: AnyPath) -> dict[str, dict[str, str]]:
    """Name and hash of each function that the run was given."""
    file = directory / RECIPE
    return read_json(file, CheckpointError) if file.is_file() else {}


def read_metrics(directory: AnyPath) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; skips invalid lines, such as one that a crash cut off."""
    file = directory / METRICS
    rows = json_rows(file, lambda error: None) if file.exists() else ()
    return [dict(row) for _, row in rows if {"step", "kind"} <= row.keys()]


def held_out_losses(directory: AnyPath) -> dict[int, float]:
    """The held-out loss at each evaluated step: that of the last exit, or the share of rejected
    drafts in a run of exit blocks."""
    rows = [row for row in read_metrics(directory) if row["kind"] == EVALUATION]
    losses = {row["step"]: row.get(REJECTED, row.get("last_exit_loss")) for row in rows}
    return {step: loss for step, loss in losses.items() if loss is not None}


def best_first(steps: Iterable[int], losses: Mapping[int, float]) -> list[int]:
    """Steps with a held-out loss, sorted by it, ties newest first."""
    return sorted(losses.keys() & steps, key=lambda step: (losses[step], -step))


class RunSource:
    """A run, opened to be read as a model. Its shape and its saved steps are known. Arrays are read
    by `leaves`."""

    def __init__(self, directory: AnyPath, step: int | str | None = None):
        # Only the model's shape: another version may have written the rest of the config.
        self.path, self.settings = directory, _fields(directory / CONFIG)  # as JSON
        self.config = from_json(LlamaConfig, self.settings["model"], f"{directory / CONFIG}: model")
        self.early_exit = self.settings.get("early_exit") or {}
        if "exit_weights" in read_recipe(directory):  # which replace the curriculum
            self.early_exit = {"curriculum": "all"}
        saved = {one.number: one for one in reversed(saved_steps(directory / CHECKPOINTS))}
        if not saved:
            raise CheckpointError(f"{directory}: has no saved step yet: wait for the first one")
        numbers = [*reversed(saved)] if step is None else [step]
        if step == "best":
            numbers = best_first(saved, held_out_losses(directory))
        self._steps = [saved[number] for number in numbers if number in saved]
        if not self._steps:
            known = ", ".join(map(str, saved))
            raise CheckpointError(f"{directory}: has no step {step}: choose from {known}")
        self.step = self._steps[0].number  # that is read; an earlier one if it is damaged

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The last evaluation up to that step: a row of metrics.jsonl with loss_E and agreement_E
        at index E - 1."""
        rows = (row for row in read_metrics(self.path) if {"loss_E", "agreement_E"} <= row.keys())
        done = [row for row in rows if row["step"] <= self.step]
        return max(done, key=lambda row: row["step"], default=None)

    @property
    def agreement_E(self) -> tuple[float, ...] | None:
        """Share of greedy drafts of exit E that were right in that evaluation, at index E - 1."""
        evaluation = self.evaluation
        return None if evaluation is None else tuple(map(float, evaluation["agreement_E"]))

    def shape(self, dtype: DTypeLike) -> Llama:
        """The model's shapes, with a Block per layer."""
        return jax.eval_shape(lambda: Llama(self.config, rngs=nnx.Rngs(0), dtype=dtype))

    def leaves(
        self, *, dtype: jnp.dtype, track: Track, mesh: Mesh | None, change: Change
    ) -> dict[str, Array]:
        """The parameters of the first undamaged step by path, each changed at once. Raises
        CheckpointError."""

        def read(step: SavedStep) -> dict[str, Array]:
            return self._read(step, dtype, track, mesh, change)

        return first_whole(self._steps, read)[0]

    def _read(
        self, step: SavedStep, dtype: jnp.dtype, track: Track, mesh: Mesh | None, change: Change
    ) -> dict[str, Array]:
        """Reads one stacked parameter after another, so at most one is held twice."""
        shapes = {path: leaf.shape for path, leaf in named_leaves(self.shape(dtype)).items()}
        together: dict[str, list[str]] = {}  # path of stacked layers -> paths here
        for path in shapes:
            together.setdefault(stacked_path(path), []).append(path)
        saved, wanted = step.meta["arrays"][PARAMS], {}
        for stacked, paths in together.items():
            layers = () if stacked in paths else (len(paths),)
            whole = {stacked: layers + shapes[paths[0]]}
            adapters = (name for name in adapter_paths(stacked) if name in saved)
            whole |= {name: tuple(saved[name]["shape"]) for name in adapters}
            for path, shape in whole.items():
                stored = saved[path]["dtype"] if path in saved else dtype
                place = sharding_of(path, shape, mesh)
                wanted[path] = jax.ShapeDtypeStruct(shape, stored, sharding=place)
        step.check(PARAMS, wanted)
        leaves: dict[str, Array] = {}
        for stacked, paths in track(list(together.items())):
            names = (stacked, *adapter_paths(stacked))
            found = step.read(PARAMS, {name: wanted[name] for name in names if name in wanted})
            array, *adapter = (found[name] for name in names if name in found)
            if adapter:
                lora = from_json(LoraConfig, self.settings["lora"], f"{self.path / CONFIG}: lora")
                array = merged(array, *adapter, lora.scale)
            if not is_finite(array, dtype):
                where = f"{step.directory / PARAMS}: {stacked} has values that are "
                raise CheckpointError(where + NOT_FINITE.format(dtype.name))
            for layer, path in enumerate(paths):
                part = array if stacked in paths else _layer(array, layer)
                place = sharding_of(path, part.shape, mesh)
                leaves |= change(path, jax.device_put(part.astype(dtype), place))
        self.step = step.number
        return leaves


@jax.jit
def _layer(array: Shaped[Array, "L ..."], layer: Int[Array, ""]) -> Shaped[Array, "..."]:
    """One of the layers. Slicing all of them at once takes longer to compile."""
    return lax.dynamic_index_in_dim(array, layer, keepdims=False)


@partial(jax.jit, static_argnames="dtype")
def is_finite(array: Shaped[Array, "..."], dtype: jnp.dtype) -> Bool[Array, ""]:
    """Whether all values are numbers in this dtype."""
    return jnp.isfinite(array.astype(dtype)).all()
