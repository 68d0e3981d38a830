"""Models and training runs in files: what is read, what is written, and what is refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.checkpoints.gguf import GGUFSource
from lsjax.checkpoints.huggingface import HuggingFaceSource
from lsjax.checkpoints.run import RunSource, is_run
from lsjax.checkpoints.tensors import CheckpointError, TensorSource, Track
from lsjax.config import split_step
from lsjax.model.llama import Llama


def load(
    source: str | Path | TensorSource | RunSource,
    *,
    dtype: Any = None,
    track: Track = iter,
    mesh: Mesh | None = None,
) -> Llama:
    """The model in a Hugging Face directory, a GGUF file or a training run, with a Block per layer.

    Args:
        source: the directory or file, or what `open_checkpoint` made of it. A run gives its newest
            step that is whole; "run@200" is step 200, "run@best" the one with the lowest held-out
            loss.
        dtype: of the parameters, whatever the file has; float32 if not given.
        track: wraps the sequence of parameters that is walked, for a progress bar.
        mesh: the devices to shard the parameters over; one device by default.
    Raises:
        CheckpointError: the file is missing, damaged or of another model; in one line.
    """
    opened = open_checkpoint(source) if isinstance(source, str | Path) else source
    return opened.assemble(dtype=jnp.float32 if dtype is None else dtype, track=track, mesh=mesh)


def open_checkpoint(path: str | Path) -> TensorSource | RunSource:
    """Opens a checkpoint of any kind and checks all but the numbers in it."""
    path, step = split_step(path)
    if path.is_dir():
        return RunSource(path, step) if is_run(path) else HuggingFaceSource(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist: give an existing directory or GGUF file")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return GGUFSource(path)
    raise CheckpointError(
        f"{path}: is no GGUF file: give one, or the directory that holds config.json and "
        "safetensors (pickles are never read, as they can run code)"
    )
