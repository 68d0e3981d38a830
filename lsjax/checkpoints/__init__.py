"""Reads and writes models and training runs, and rejects damaged or unsupported files."""

import re
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.checkpoints.exit_blocks import BASE, BlocksSource, ExitBlocksRun
from lsjax.checkpoints.exported_blocks import ExportedBlocks
from lsjax.checkpoints.gguf import GGUFSource
from lsjax.checkpoints.huggingface import HuggingFaceSource
from lsjax.checkpoints.narrowing import built, change_of
from lsjax.checkpoints.run import CHECKPOINTS, CONFIG, RunSource, is_run
from lsjax.checkpoints.tensors import CheckpointError, TensorSource, Track
from lsjax.config import AnyPath, Weights, as_path, check, split_step
from lsjax.io.files import WEIGHTS, local_copy, read_json
from lsjax.model.llama import Llama

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name, as on huggingface.co


def load(
    source: str | AnyPath | TensorSource | RunSource,
    *,
    dtype: Any = None,
    track: Track = iter,
    mesh: Mesh | None = None,
    exit_blocks: str | AnyPath | None = None,
    weights: Weights = "float",
) -> Llama:
    """Loads a Hugging Face directory, a GGUF file or a training run, with a Block per layer.

    Args:
        source: the directory or file, or the result of `open_checkpoint`. A run loads its newest
            undamaged step. "run@200" is step 200; "run@best" has the lowest held-out loss.
        dtype: dtype of the parameters, whatever the file has; float32 by default.
        track: wraps the sequence of parameters, for a progress bar.
        mesh: devices to shard the parameters over; one device by default.
        exit_blocks: run of exit blocks that hang off this model, or exported ones.
        weights: "int8" rounds the matrices while they are read. Only for decoding.
    Raises:
        CheckpointError: the file is missing, damaged or of another model; one line.
    """
    opened = source
    if isinstance(source, str | AnyPath):
        opened = open_checkpoint(source, exit_blocks)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    change = change_of(weights, opened.config.tie_embeddings, dtype)
    leaves = opened.leaves(dtype=dtype, track=track, mesh=mesh, change=change)
    return built(opened.shape(dtype), leaves, weights)


def open_checkpoint(
    path: str | AnyPath, exit_blocks: str | AnyPath | None = None
) -> TensorSource | RunSource:
    """Opens a checkpoint of any kind and checks everything except its values. exit_blocks: run of
    exit blocks that hang off this model, or exported ones."""
    if exit_blocks is not None:
        return open_blocks(exit_blocks, open_checkpoint(path))
    if (split_step(path)[0] / BASE).is_file():
        return open_blocks(path, open_base(split_step(path)[0]))
    path, step = find_step(path)
    if is_run(path):
        return RunSource(path, step)
    if path.is_dir():
        return HuggingFaceSource(local_copy(path, wanted=WEIGHTS))
    if not path.exists():
        fix = "give an existing directory or GGUF file"
        if HUB_NAME.fullmatch(f"{path}") and not path.parent.exists():
            fix += f", or download it: hf download {path} --local-dir models/{path.name}"
        raise CheckpointError(f"{path}: does not exist: {fix}")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return GGUFSource(local_copy(path))
    raise CheckpointError(
        f"{path}: is not a GGUF file: give one, or the directory that holds config.json and "
        "safetensors (pickles are never read, as they can run code)"
    )


def open_blocks(path: str | AnyPath, base: TensorSource | RunSource) -> BlocksSource:
    """Opens a run of exit blocks, or exported ones. Raises CheckpointError."""
    directory, step = split_step(path)
    if not (directory / BASE).is_file():
        raise CheckpointError(f"{directory}: has no exit blocks: name the run that trained them")
    if (directory / CHECKPOINTS).is_dir():
        return ExitBlocksRun(directory, step, base)
    if step is not None:
        raise CheckpointError(f"{directory} is not a training run: leave out @{step}")
    return ExportedBlocks(directory, base)


def open_base(run: AnyPath) -> TensorSource | RunSource:
    """The model that a run's exit blocks hang off. Raises CheckpointError."""
    base = read_json(run / CONFIG, CheckpointError, ("init_from",))["init_from"]
    try:
        check(as_path(base).resolve() != run.resolve(), f"{base} is the run itself")
        return open_checkpoint(base)
    except ValueError as error:
        raise CheckpointError(
            f"{run}: its exit blocks need the model in init_from of its {CONFIG} ({error}). If it "
            f"has moved: --model MODEL --exit-blocks {run}"
        ) from error


def find_step(path: str | AnyPath) -> tuple[AnyPath, int | str | None]:
    """A checkpoint's directory or file, and the step of a run that follows an @ (`split_step`).

    Raises CheckpointError for a step of anything else, as only a run has steps.
    """
    directory, step = split_step(path)
    if step is not None and not is_run(directory):
        raise CheckpointError(
            f"{path}: {directory} is not a training run, so it has no steps: leave out @{step}"
        )
    return directory, step
