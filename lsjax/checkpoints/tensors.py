"""From the tensors of a file to a Llama: what every format shares.

A format (huggingface.py, gguf.py) offers its tensors by name, and lsjax/model/parameters.py says
which parameter each of them is a part of. Nothing is filled in: a tensor that is missing, extra or
not finite is a `CheckpointError`.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lsjax.config import LlamaConfig
from lsjax.model.llama import Llama
from lsjax.model.parameters import Names, named_leaves, sharding_of, tensors_of

Index = tuple[slice, ...]  # of a shard in an array, axis by axis
Track = Callable[[Sequence[Any]], Iterable[Any]]  # hands a sequence on, and may show how far
# Constants that transformers < 4.32 and llama.cpp store beside the weights.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn_rot_embd\.weight|rope_freqs\.weight)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line with the file, the values, the fix."""


class Part(NamedTuple):
    """A tensor of a file as a part of one parameter."""

    tensor: str  # its name in the file
    path: str  # of the parameter
    slot: int | slice | None  # in the parameter's last but one axis; None: the whole parameter

    @property
    def is_kernel(self) -> bool:
        """Whether the file has it as [out, in]."""
        return self.path.endswith("kernel")

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """This part of a parameter, or of a shard with all slots, with the file's order of axes."""
        part = parameter if self.slot is None else parameter[..., self.slot, :]
        return np.moveaxis(part, 0, -1) if self.is_kernel else part

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the `view` of a parameter of that shape."""
        if self.slot is not None:
            *lead, slots, last = shape
            taken = range(slots)[self.slot]
            shape = (*lead, last) if isinstance(taken, int) else (*lead, len(taken), last)
        return (*shape[1:], shape[0]) if self.is_kernel else shape

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file: all axes but that of the inputs are one; biases are flat."""
        sizes = self.sizes(shape)
        if self.path.endswith("bias") or len(sizes) == 1:
            return (math.prod(sizes),)
        return (math.prod(sizes[:-1]), sizes[-1])

    def stored(self, parameter: Any) -> np.ndarray:
        """The tensor as the file has it."""
        view = self.view(np.asarray(parameter))
        return np.ascontiguousarray(view.reshape(self.stored_shape(parameter.shape)))

    def pieces(
        self, shard: np.ndarray, tensor: Any, index: Index, shape: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(Piece of a shard's `view`, the numbers for it), so that one piece is read at a time.

        Axes between the first and the last are not sharded.
        """
        view = self.view(shard)
        if isinstance(self.slot, int):
            index = (*index[:-2], index[-1])
        if self.is_kernel:
            index = (*index[1:], index[0])
        sizes, (rows, *columns) = self.sizes(shape), self.stored_shape(shape)
        first = range(sizes[0])[index[0]].start
        inner = rows // sizes[0]
        for begin, end in spans(len(view)):
            taken = slice((first + begin) * inner, (first + end) * inner)
            values = tensor[(taken, index[-1]) if columns else (taken,)]
            yield view[begin:end], values.reshape(view[begin:end].shape)


def parts_of(path: str, names: Names) -> list[Part]:
    """The tensors that a parameter consists of."""
    return [Part(name, path, slot) for name, slot in tensors_of(path, names)]


def spans(length: int, most: int = 256) -> Iterator[tuple[int, int]]:
    """At most so many pieces of a range, as (begin, end)."""
    step = -(-length // most)
    return ((begin, min(begin + step, length)) for begin in range(0, length, max(step, 1)))


class TensorSource(ABC):
    """An opened file or directory of tensors: their shapes are known, none has been read."""

    path: Path
    config: LlamaConfig
    names: Names  # which column of the table names the tensors
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by its name in the file

    @abstractmethod
    def read(self, name: str) -> Any:
        """One tensor, to be sliced: in its stored dtype, or in float32 if it was quantised.

        Where the format allows it, only what is sliced out is read.
        """

    @abstractmethod
    def where(self, name: str) -> str:
        """The file that holds a tensor, and its name, for messages."""

    def assemble(self, *, dtype: Any, track: Track, mesh: Mesh | None) -> Llama:
        """Builds the model, each parameter straight in its dtype and with its sharding.

        The host holds one shard of one parameter at a time, and reads each once.
        """
        config, dtype = self.config, jnp.dtype(dtype)
        if config.num_layers > len(self.shapes):  # before a model of that many layers is laid out
            raise CheckpointError(
                f"{self.path}: a config of {config.num_layers} layers, "
                f"but {len(self.shapes)} tensors: correct the number of layers"
            )
        model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
        shapes = {path: leaf.shape for path, leaf in named_leaves(model).items()}
        self._check(shapes)
        arrays = []
        for path in track(list(shapes)):
            read = parameter_reader(self, path, shapes[path], dtype)
            arrays.append(_read_onto(mesh, read, path, shapes[path]))
        return jax.tree.unflatten(jax.tree.structure(model), arrays)

    def _check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises unless the tensors are exactly those of the model, in name and shape."""
        stored = {
            part.tensor: part.stored_shape(shape)
            for path, shape in wanted.items()
            for part in parts_of(path, self.names)
        }
        missing = [name for name in stored if name not in self.shapes]
        if missing:
            raise CheckpointError(
                f"{self.where(missing[0])}: tensor is missing ({len(missing)} of {len(stored)} "
                "are): the checkpoint is incomplete or its config is of another model"
            )
        extra = [
            name for name in self.shapes if name not in stored and not _DERIVED.fullmatch(name)
        ]
        (head,) = parts_of("head", self.names)
        if self.config.tie_embeddings and head.tensor in extra:
            self._check_tied(head.tensor)
            extra.remove(head.tensor)
        if extra:
            raise CheckpointError(
                f"{self.where(extra[0])}: tensor has no place in this Llama ({len(extra)} such): "
                "the config is of another model, or a variant that is not supported"
            )
        for name, shape in stored.items():
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.where(name)}: shape {self.shapes[name]}, but the config asks for "
                    f"{shape}: the config is of another model"
                )

    def _check_tied(self, head: str) -> None:
        """A head beside tied embeddings must be the same matrix: which one counts is ambiguous."""
        embedding = parts_of("embedding", self.names)[0].tensor
        one, other = self.read(head), self.read(embedding)
        if self.shapes[head] != self.shapes[embedding] or not all(
            np.array_equal(one[begin:end], other[begin:end])
            for begin, end in spans(self.shapes[head][0])
        ):
            raise CheckpointError(
                f"{self.where(head)}: differs from {embedding}, but the config ties them: set "
                "tie_word_embeddings to false to use this head, or remove the tensor"
            )


def parameter_reader(
    source: TensorSource, path: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """Reads shards of one parameter, each filled tensor by tensor.

    Raises CheckpointError for values that are not finite.
    """
    parts = [(part, source.read(part.tensor)) for part in parts_of(path, source.names)]

    def read(index: Index) -> np.ndarray:
        taken = (range(size)[some] for size, some in zip(shape, index, strict=True))
        shard = np.zeros([len(some) for some in taken], dtype)
        for part, tensor in parts:
            bad, in_file = 0, False
            for piece, values in part.pieces(shard, tensor, index, shape):
                with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
                    piece[...] = values
                infinite = piece.size - np.count_nonzero(np.isfinite(piece))
                bad += infinite
                in_file |= infinite > 0 and not np.isfinite(values).all()
            if bad:
                problem = (
                    "values are NaN or infinite: the checkpoint is damaged"
                    if in_file
                    else f"values are too large for {dtype.name}: use float32 or bfloat16"
                )
                where, size = source.where(part.tensor), part.view(shard).size
                raise CheckpointError(f"{where}: {bad} of {size} {problem}")
        return shard

    return read


def _read_onto(
    mesh: Mesh | None, read: Callable[[Index], np.ndarray], path: str, shape: tuple[int, ...]
) -> Array:
    """The array that `read` gives shard by shard, each once for all devices that hold it."""
    sharding = sharding_of(path, shape, mesh)
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    holders: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)

    shards: list[Array] = []
    for index, devices in holders.values():
        shard = read(index)
        shards += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
        del shard  # before the next one is read
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds a {type(raw).__name__}, but must be a JSON object")
    return raw


def write_json(file: Path, content: Any) -> None:
    """Indented, with a newline at the end."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_KINDS = {
    int: "whole number below 2^31",
    float: "finite number",
    bool: "boolean",
    str: "string",
    dict: "table",
}


def take(raw: Mapping[str, Any], key: str, kind: type, default: Any, where: str | Path) -> Any:
    """raw[key] if it is of that kind (int, float, bool, str or dict), default if absent or null."""
    value = raw.get(key)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        good = is_number and abs(value) < 1e30  # also false for NaN
    elif kind is int:
        good = is_number and isinstance(value, int) and abs(value) < 2**31
    else:
        good = isinstance(value, kind)
    if not good:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise CheckpointError(f"{where}: {key} is {shown}, but must be a {_KINDS[kind]}")
    return float(value) if kind is float else value
