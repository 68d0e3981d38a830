"""The directory of a training run, and the model in it.

    config.json     the run's configuration, with the model's shape (lsjax/config/checked.py)
    tokenizer.*     the tokenizer's files, and generation_config.json if there is one
    token_counts.json, prompts.jsonl        for decoding (lsjax/training/prepare.py)
    metrics.jsonl   one line of metrics for each logged step
    checkpoints/    the saved steps (steps.py)

A run can be loaded as a model: its newest undamaged step, or the step after an @ in its path.
"""

import json
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lsjax.checkpoints.saving import best_first
from lsjax.checkpoints.steps import PARAMS, SavedStep, first_whole, saved_steps
from lsjax.checkpoints.tensors import CheckpointError, Track, not_finite
from lsjax.config import LlamaConfig, LoraConfig, Path, TrainConfig, check
from lsjax.config.checked import from_json, versioned, without_version
from lsjax.data.files import read_json, write_json
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.model.llama import Llama
from lsjax.model.lora import merged
from lsjax.model.parameters import adapter_paths, named_leaves, sharding_of, stacked_path

CONFIG, CHECKPOINTS, METRICS = "config.json", "checkpoints", "metrics.jsonl"
EVALUATION = "evaluation"  # kind of the METRICS rows with held-out losses


def is_run(directory: Path) -> bool:
    """Whether a training run has begun in this directory."""
    file = directory / CONFIG
    return file.is_file() and {"version", "model"} <= read_json(file, CheckpointError).keys()


def begin_run(directory: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
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
    check(
        not begun or is_run(directory),
        f"{directory} holds another model: choose a new directory",
    )
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


def _has_tokenizer(model: str | Path, tokenizer: Tokenizer) -> bool | None:
    """Whether a model's tokenizer equals this one; None if it has no readable tokenizer."""
    try:
        return load_tokenizer(model).fingerprint == tokenizer.fingerprint
    except TokenizerError:
        return None


def _read_fields(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    return without_version(read_json(file, CheckpointError), str(file))


def read_run_config(directory: Path) -> TrainConfig:
    """The run's configuration. Raises ConfigError if the directory holds no run."""
    return from_json(TrainConfig, _read_fields(directory), str(directory / CONFIG))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; skips invalid lines, such as one that a crash cut off."""
    path = directory / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            row["step"], row["kind"]
            rows.append(row)
    return rows


def held_out_losses(directory: Path) -> dict[int, float]:
    """The last exit's held-out loss at each evaluated step."""
    losses = {
        row["step"]: row.get("last_exit_loss")
        for row in read_metrics(directory)
        if row["kind"] == EVALUATION
    }
    return {step: loss for step, loss in losses.items() if loss is not None}


class RunSource:
    """A run opened as a model: its shape is known, no array has been read."""

    def __init__(self, directory: Path, step: int | str | None = None):
        # Only the model's shape: another version may have written the rest of the config.
        self.path, self._fields = directory, _read_fields(directory)
        self.config = from_json(LlamaConfig, self._fields["model"], f"{directory / CONFIG}: model")
        self.early_exit = self._fields.get("early_exit") or {}  # of the config, as JSON
        self._steps = saved_steps(directory / CHECKPOINTS)
        if not self._steps:
            raise CheckpointError(f"{directory}: has no saved step yet: wait for the first one")
        by_number = {saved.number: saved for saved in reversed(self._steps)}
        if step == "best":
            losses = held_out_losses(directory)
            numbers = best_first(by_number.keys() & losses, losses)
            if not numbers:
                raise CheckpointError(f"{directory}: no step has a held-out loss: give a number")
            self._steps = [by_number[number] for number in numbers]
        elif step is not None:
            if step not in by_number:
                known = ", ".join(map(str, by_number))
                raise CheckpointError(f"{directory}: has no step {step}: choose from {known}")
            self._steps = [by_number[step]]

    def assemble(self, *, dtype: Any, track: Track, mesh: Mesh | None) -> Llama:
        """The model of the first undamaged step, with a Block per layer.

        Raises CheckpointError if all steps are damaged, or if a value does not fit the dtype.
        """
        return first_whole(
            self._steps, lambda step: self._read(step, jnp.dtype(dtype), track, mesh)
        )[0]

    def _read(self, step: SavedStep, dtype: jnp.dtype, track: Track, mesh: Mesh | None) -> Llama:
        """Reads one stacked parameter after another, so at most one is held twice."""
        model = jax.eval_shape(lambda: Llama(self.config, rngs=nnx.Rngs(0), dtype=dtype))
        shapes = {path: leaf.shape for path, leaf in named_leaves(model).items()}
        together: dict[str, list[str]] = {}  # path of stacked layers -> paths here
        for path in shapes:
            together.setdefault(stacked_path(path), []).append(path)
        adapters = {adapter for path in together for adapter in adapter_paths(path)}
        step.check_names(PARAMS, together.keys() | adapters)
        saved = step.meta["arrays"][PARAMS]

        def read(path: str, shape: tuple[int, ...]) -> Array:
            stored = saved[path]["dtype"] if path in saved else dtype
            wanted = jax.ShapeDtypeStruct(shape, stored, sharding=sharding_of(path, shape, mesh))
            return step.read(PARAMS, {path: wanted})[path]

        arrays: dict[str, Array] = {}
        for stacked, paths in track(list(together.items())):
            layers = () if stacked in paths else (len(paths),)
            array = read(stacked, layers + shapes[paths[0]])
            names = [path for path in adapter_paths(stacked) if path in saved]
            adapter = [read(path, tuple(saved[path]["shape"])) for path in names]
            if adapter:
                lora = from_json(LoraConfig, self._fields["lora"], f"{self.path / CONFIG}: lora")
                array = merged(array, *adapter, lora.scale)
            if not jnp.isfinite(array.astype(dtype)).all():
                where = f"{step.directory / PARAMS}: {stacked}"
                raise CheckpointError(f"{where} has values that are {not_finite(dtype)}")
            for path, part in zip(paths, array if layers else [array], strict=True):
                place = sharding_of(path, part.shape, mesh)
                arrays[path] = jax.device_put(part.astype(dtype), place)
        return jax.tree.unflatten(jax.tree.structure(model), [arrays[path] for path in shapes])
