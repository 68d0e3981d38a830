"""The directory of a training run, and the model in it.

    config.json     the run's configuration, with the model's shape (lsjax/config/json_form.py)
    tokenizer.*     the tokenizer's files, and generation_config.json if there is one
    token_counts.json, prompts.jsonl        for decoding (lsjax/cli/run_files.py)
    metrics.jsonl   a line of figures for each logged step
    checkpoints/    the saved steps (saved_step.py)

A run is a model like any other: the newest of its steps that is whole, or the one that follows an
@ in its path. Nothing of training is imported to load it.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lsjax.checkpoints.plain import NAMES
from lsjax.checkpoints.safetensors_files import read_json, write_json
from lsjax.checkpoints.saved_step import PARAMS, SavedStep, best_first, first_good, saved_steps
from lsjax.checkpoints.tensors import CheckpointError, Track, named_parameters
from lsjax.config import ConfigError, LlamaConfig, LoraConfig, TrainConfig, check
from lsjax.config.json_form import from_json, versioned, without_version
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizers import Tokenizer, TokenizerError
from lsjax.model.llama import Llama
from lsjax.model.lora import merged
from lsjax.sharding import sharding_of

CONFIG, CHECKPOINTS, METRICS = "config.json", "checkpoints", "metrics.jsonl"
EVALUATION = "evaluation"  # kind of the rows of METRICS that have held-out losses


def is_run(directory: Path) -> bool:
    """Whether a training run has begun in this directory."""
    file = directory / CONFIG
    return file.is_file() and {"version", "model"} <= read_json(file).keys()


def begin_run(directory: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes what a run's directory has from the start, for a config whose model is known.

    config.json comes last: where it is, the rest is. A run that goes on gets a new config.json.
    Raises ConfigError where tokenizer and model do not fit, the directory holds another model, the
    run has begun with another tokenizer, or the model that it begins with has another one.
    """
    assert config.model is not None
    size, rows = tokenizer.fitted(config.model.vocab_size).vocab_size, config.model.vocab_size
    check(
        rows < 2 * size,
        f"the tokenizer has {size} tokens, but the model's vocabulary is {rows}: choose another "
        "data.tokenizer, or set model.vocab_size (a little more than the tokenizer has is fine)",
    )
    file = directory / CONFIG
    check(
        not file.exists() or is_run(directory),
        f"{directory} holds another model: choose a new directory",
    )
    if file.exists():
        same = _has_tokenizer(directory, tokenizer)
        check(
            same is not False,
            f"{directory} was begun with another tokenizer than data.tokenizer gives now: the data "
            "or the Python that it is trained from changed; begin another run in a new directory",
        )
    else:
        same = None
    if config.init_from and not saved_steps(directory / CHECKPOINTS):
        check(
            _has_tokenizer(config.init_from, tokenizer) is not False,
            f"data.tokenizer is not the one of {config.init_from}, whose table has other tokens in "
            f"the same rows: set data.tokenizer to {config.init_from}",
        )
    directory.mkdir(parents=True, exist_ok=True)
    if not same:
        tokenizer.save(directory)
    partial = file.with_name(f".{CONFIG}.partial")
    write_json(partial, versioned(config))
    partial.replace(file)


def _has_tokenizer(model: str | Path, tokenizer: Tokenizer) -> bool | None:
    """Whether a model's tokenizer is this one; None where it has none that can be read."""
    try:
        return load_tokenizer(model).fingerprint == tokenizer.fingerprint
    except TokenizerError:
        return None


def read_run_config(directory: Path) -> TrainConfig:
    """The configuration of the run in a directory; raises ConfigError for what is none."""
    file = directory / CONFIG
    return from_json(TrainConfig, without_version(read_json(file), str(file)), str(file))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; a last line that a crash cut off is left out.

    Raises ConfigError for another line that is no row.
    """
    path = directory / METRICS
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"], row["kind"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}:{number}: is no row of metrics: remove the line, or the file"
            ) from None
        rows.append(row)
    return rows


def held_out_losses(directory: Path) -> dict[int, float]:
    """The last exit's loss by step, of the steps of a run that were evaluated."""
    losses = {
        row["step"]: row.get("last_exit_loss")
        for row in read_metrics(directory)
        if row["kind"] == EVALUATION
    }
    return {step: loss for step, loss in losses.items() if loss is not None}


class RunSource:
    """A run that is opened as a model: its shape is known, nothing large has been read."""

    def __init__(self, directory: Path, step: int | str | None = None):
        self.path = directory
        file = directory / CONFIG
        # The rest of the config may be of another version's training.
        shape = without_version(read_json(file), str(file))["model"]
        self.config = from_json(LlamaConfig, shape, f"{file}: model")
        self._steps = saved_steps(directory / CHECKPOINTS)
        if not self._steps:
            raise CheckpointError(f"{directory}: has no saved step yet: wait for the first one")
        if step == "best":
            self._steps = best_first(self._steps, held_out_losses(directory))
        if isinstance(step, int):
            numbers = ", ".join(str(saved.number) for saved in reversed(self._steps))
            self._steps = [saved for saved in self._steps if saved.number == step]
            if not self._steps:
                raise CheckpointError(f"{directory}: has no step {step}: there are {numbers}")

    def assemble(self, *, dtype: Any, track: Track, mesh: Mesh | None) -> Llama:
        """The model of the first step that is whole, with a Block per layer.

        Raises CheckpointError where there is none, or where a value does not fit the dtype.
        """

        def read(step: SavedStep) -> Llama:
            return _assemble(step, self.config, jnp.dtype(dtype), track, mesh)

        return first_good(self._steps, read)[0]


def _with_adapter(step: SavedStep, path: str, kernel: Array, mesh: Mesh | None) -> Array:
    """The matrix of a finetuned model, whose adapter is saved beside it."""
    config = from_json(LoraConfig, step.meta["config"]["lora"], f"{step.directory}: lora")
    wanted = {}
    for part in ("a", "b"):
        part_path = path.replace("kernel", f"adapter.{part}")
        saved = step.meta["arrays"][PARAMS][NAMES[part_path]]
        shape = tuple(saved["shape"])
        sharding = None if mesh is None else sharding_of(part_path, shape, mesh)
        wanted[NAMES[part_path]] = jax.ShapeDtypeStruct(shape, saved["dtype"], sharding=sharding)
    arrays = step.read(PARAMS, wanted)
    return merged(kernel, *(arrays[name] for name in wanted), config.scale)


def _assemble(
    step: SavedStep, config: LlamaConfig, dtype: jnp.dtype, track: Track, mesh: Mesh | None
) -> Llama:
    """One stacked parameter after the other is read and shared out among the layers, so that no
    more than one is there twice."""
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    parameters, structure = named_parameters(model)
    together: dict[str, list[str]] = {}  # path in a stacked model -> paths here
    for path in parameters:
        together.setdefault(re.sub(r"^layers\.\d+\.", "layers.", path), []).append(path)
    saved = step.meta["arrays"][PARAMS]
    known = {NAMES[path] for path in together}
    adapters = {f"{name}_lora_{part}" for name in known for part in ("a", "b")}
    strange = saved.keys() - known - adapters
    if strange:
        raise CheckpointError(
            f"{step.directory / PARAMS}: {min(strange)} has no place in this Llama: the config is "
            "of another model"
        )
    arrays: dict[str, Array] = {}
    for stacked_path, paths in track(list(together.items())):
        name, shape = NAMES[stacked_path], parameters[paths[0]].shape
        is_stacked = stacked_path != paths[0]
        if is_stacked:
            shape = (len(paths), *shape)
        sharding = None if mesh is None else sharding_of(stacked_path, shape, mesh)
        stored = saved[name]["dtype"] if name in saved else dtype
        want = jax.ShapeDtypeStruct(shape, stored, sharding=sharding)
        leaf = step.read(PARAMS, {name: want})[name]
        if f"{name}_lora_a" in saved:
            leaf = _with_adapter(step, stacked_path, leaf, mesh)
        if not jnp.isfinite(leaf.astype(dtype)).all():
            fault = "too large for it" if jnp.isfinite(leaf).all() else "NaN or infinite"
            where = f"{step.directory / PARAMS}: {name}"
            raise CheckpointError(f"{where} as {dtype.name} has values that are {fault}")
        for path, part in zip(paths, leaf if is_stacked else [leaf], strict=True):
            part = part.astype(dtype)
            arrays[path] = (
                part if mesh is None else jax.device_put(part, sharding_of(path, part.shape, mesh))
            )
    return jax.tree.unflatten(structure, [nnx.Param(arrays[path]) for path in parameters])
