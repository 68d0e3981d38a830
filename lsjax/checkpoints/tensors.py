"""From the tensors of a file to a Llama: what every checkpoint format shares.

A format (huggingface.py, gguf.py) offers its tensors one by one, under their Hugging Face names,
as a `TensorSource`; parts.py says which parameter each of them is a part of. Nothing is ever
filled in: a tensor that is missing, strange or not finite is a `CheckpointError`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from lsjax.checkpoints.parts import Index, Part, model_parts
from lsjax.config import LlamaConfig, split_step
from lsjax.model.llama import Llama
from lsjax.sharding import sharding_of


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line with the file, the values, the fix."""


@runtime_checkable
class TensorSource(Protocol):
    """An opened checkpoint: what it holds is known, nothing large has been read."""

    path: Path
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by its Hugging Face name

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype, or in float32 if it was quantised. Mapped from the file
        where that can be, so that only the part that somebody slices out is read."""
        ...

    def where(self, name: str) -> str:
        """The file that holds the tensor, and its name there, for messages."""
        ...


@runtime_checkable
class ModelSource(Protocol):
    """An opened checkpoint that holds a model's own parameters (run_directory.py)."""

    path: Path
    config: LlamaConfig

    def assemble(self, *, dtype: Any, track: "Track", mesh: Mesh | None) -> Llama:
        """See `assemble`."""
        ...


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Constants that transformers < 4.32 and llama.cpp store beside the weights.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn_rot_embd\.weight|rope_freqs\.weight)")

Track = Callable[[Sequence[Any]], Iterable[Any]]  # hands a sequence on, and may show how far


def load(
    path: str | Path, *, dtype: Any = None, track: Track = iter, mesh: Mesh | None = None
) -> Llama:
    """The model in a Hugging Face directory, a GGUF file or a training run, with a Block per layer.

    Args:
        path: the directory, or the file. Of a run it is the newest step that is whole;
            "run@200" is step 200, "run@best" the one with the lowest held-out loss.
        dtype: of the parameters, whatever the file has; float32 if not given.
        track: wraps the sequence of parameters that is walked, for a progress bar.
        mesh: the devices to spread the parameters over (lsjax/sharding.py); one by default.
    Raises:
        CheckpointError: whatever is wrong with the file, in one line.
    """
    dtype = jnp.float32 if dtype is None else dtype
    return assemble(open_checkpoint(path), dtype=dtype, track=track, mesh=mesh)


def open_checkpoint(path: str | Path) -> TensorSource | ModelSource:
    """Opens a checkpoint of any kind and checks all but the numbers in it."""
    # Here, because the formats import this module.
    from lsjax.checkpoints.gguf import GGUFSource
    from lsjax.checkpoints.huggingface import HuggingFaceSource
    from lsjax.checkpoints.run_directory import RunSource, is_run

    path, step = split_step(path)
    if path.is_dir():
        return RunSource(path, step) if is_run(path) else HuggingFaceSource(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist: give an existing directory or GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return GGUFSource(path)
    if not magic:
        problem = "is empty"
    elif magic == b"PK\3\4" or magic[0] == 0x80:
        problem = "is a zip or pickle file, which can run code when read"
    elif path.suffix == ".safetensors":
        problem = "lacks its configuration: give the directory that holds it and config.json"
    else:
        problem = f"starts with {magic!r}, which no model file does"
    raise CheckpointError(
        f"{path}: {problem}; only directories with safetensors and GGUF files are read"
    )


def assemble(
    source: TensorSource | ModelSource,
    *,
    dtype: Any,
    track: Track = iter,
    mesh: Mesh | None = None,
) -> Llama:
    """Builds the model parameter by parameter, each straight in its dtype and where it belongs.

    Of a file with tensors the host holds one shard of one parameter at a time, and reads each once.
    """
    if not isinstance(source, TensorSource):
        return source.assemble(dtype=dtype, track=track, mesh=mesh)
    config, shapes, dtype = source.config, source.shapes, jnp.dtype(dtype)
    if config.num_layers > len(shapes):  # before a model of that many layers is laid out
        raise CheckpointError(
            f"{source.path}: a config of {config.num_layers} layers, "
            f"but {len(shapes)} tensors: correct the number of layers"
        )
    abstract = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    parameters, structure = named_parameters(abstract)
    wanted = {name: parameter.shape for name, parameter in parameters.items()}
    parts: dict[str, list[Part]] = {name: [] for name in wanted}
    for part in model_parts(config):
        if part.parameter in parts:
            parts[part.parameter].append(part)
    _check_tensors(
        source, [(part, shape) for name, shape in wanted.items() for part in parts[name]]
    )
    arrays = []
    for name in track(list(wanted)):
        shape = wanted[name]
        read = parameter_reader(source, parts[name], shape, dtype)
        sharding = None if mesh is None else sharding_of(name, shape, mesh)
        arrays.append(nnx.Param(_placed(read, shape, sharding)))
    return jax.tree.unflatten(structure, arrays)


def _placed(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None
) -> Array:
    """The array that `read` gives shard by shard, each once for all devices that hold it."""
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    holders: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)

    def put(index: Index, devices: Sequence[jax.Device]) -> list[Array]:
        shard = read(index)
        return jax.block_until_ready([jax.device_put(shard, device) for device in devices])

    shards = [array for held in holders.values() for array in put(*held)]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def named_parameters(model: Llama) -> tuple[dict[str, nnx.Param], jax.tree_util.PyTreeDef]:
    """Parameters by path ("layers.0.attention.qkv.kernel"), and the tree to put such in again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return named, structure


def parameter_reader(
    source: TensorSource, parts: Sequence[Part], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """Reads shards of one parameter, each filled tensor by tensor.

    Raises CheckpointError for values that are not finite.
    """
    tensors = [source.read(part.tensor) for part in parts]

    def read(index: Index) -> np.ndarray:
        sizes = (range(size)[taken] for size, taken in zip(shape, index, strict=True))
        shard = np.zeros([len(taken) for taken in sizes], dtype)
        for part, tensor in zip(parts, tensors, strict=True):
            view = part.view(shard)
            tensor = part.as_parameter(tensor, shape)[part.index(index)]
            with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                view[...] = tensor
            # In pieces, because the answer is as long as the values.
            if not all(np.isfinite(piece).all() for piece in np.array_split(view, 64)):
                in_file = not np.isfinite(tensor).all()
                problem = (
                    "values are NaN or infinite: the checkpoint is damaged"
                    if in_file
                    else f"values are too large for {dtype.name}: use float32 or bfloat16"
                )
                count = view.size - np.count_nonzero(np.isfinite(view))
                where = source.where(part.tensor)
                raise CheckpointError(f"{where}: {count} of {view.size} {problem}")
        return shard

    return read


def _check_tensors(source: TensorSource, wanted: Sequence[tuple[Part, tuple[int, ...]]]) -> None:
    """Raises unless the tensors are exactly those of the model, in name and shape."""
    shapes, tied = source.shapes, source.config.tie_embeddings
    missing = [part.tensor for part, _ in wanted if part.tensor not in shapes]
    if missing:
        raise CheckpointError(
            f"{source.where(missing[0])}: tensor is missing ({len(missing)} of {len(wanted)} are): "
            "the checkpoint is incomplete or its config is of another model"
        )
    names = {part.tensor for part, _ in wanted}
    extra = [name for name in shapes if name not in names and not _DERIVED.fullmatch(name)]
    if tied and _HEAD in extra:
        _check_tied(source)
        extra.remove(_HEAD)
    if extra:
        raise CheckpointError(
            f"{source.where(extra[0])}: tensor has no place in this Llama ({len(extra)} such): "
            "the config is of another model, or a variant that is not supported"
        )
    for part, parameter_shape in wanted:
        stored = part.stored_shape(parameter_shape)
        if shapes[part.tensor] != stored:
            raise CheckpointError(
                f"{source.where(part.tensor)}: shape {shapes[part.tensor]}, but the config asks "
                f"for {stored}: the config is of another model"
            )


def _check_tied(source: TensorSource) -> None:
    """A head beside tied embeddings must be the same matrix: which one counts is ambiguous."""
    if source.shapes[_HEAD] != source.shapes[_EMBEDDING] or not np.array_equal(
        source.read(_HEAD), source.read(_EMBEDDING)
    ):
        raise CheckpointError(
            f"{source.where(_HEAD)}: differs from {_EMBEDDING}, but the config ties them: set "
            "tie_word_embeddings to false to use this head, or remove the tensor"
        )


def take(raw: Mapping[str, Any], key: str, kind: type, default: Any, where: str | Path) -> Any:
    """raw[key] if it is of that kind (int, float, bool, str or dict), default if absent or null."""
    value = raw.get(key)
    if value is None:
        return default
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and abs(value) < 1e30  # also false for NaN
    if kind is int:
        good = good and abs(value) < 2**31
    if not good:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise CheckpointError(f"{where}: {key} is {shown}, but must be a {_KINDS[kind]}")
    return float(value) if kind is float else value


_KINDS = {
    int: "whole number below 2^31",
    float: "finite number",
    bool: "boolean",
    str: "string",
    dict: "table",
}
