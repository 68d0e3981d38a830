"""From the tensors of a file to a Llama: code that every format shares.

A format (huggingface.py, gguf.py) offers its tensors by name. lsjax/model/parameters.py maps each
tensor to a parameter.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from lsjax.checkpoints.narrowing import Change
from lsjax.config import AnyPath, LlamaConfig
from lsjax.model.int8 import Rounded
from lsjax.model.llama import Llama
from lsjax.model.parameters import Names, named_leaves, sharding_of, tensors_of

Index = tuple[slice, ...]  # place of a shard in an array, one slice per axis
Track = Callable[[Sequence[Any]], Iterable[Any]]  # passes a sequence on, and may show progress
Report = Callable[[str], None]  # shows a line
AT_ONCE = 2**23  # values that are read together
NOT_FINITE = "NaN, infinite or too large for {}: the file is damaged, or needs float32 or bfloat16"
# Constants that transformers < 4.32 and llama.cpp store beside the weights.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn_rot_embd\.weight|rope_freqs\.weight)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line with the file, the values, the fix."""


class Part(NamedTuple):
    """A file's tensor as a part of one parameter."""

    tensor: str  # its name in the file
    path: str  # path of the parameter
    slot: int | slice | None  # in the parameter's second-to-last axis; None: the whole parameter

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """This part of a parameter, or of a shard with all slots, in the file's axis order."""
        part = parameter if self.slot is None else parameter[..., self.slot, :]
        return np.moveaxis(part, 0, -1) if self.path.endswith("kernel") else part

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file: [outputs, inputs]; biases and scales of norms are flat."""
        sizes = self.view(np.broadcast_to(0, shape)).shape
        if self.path.endswith(("kernel_scale", "head.scale")):  # of int8 matrices
            return (math.prod(sizes), 1)
        if self.path.endswith(("bias", "scale")):
            return (math.prod(sizes),)
        return (math.prod(sizes[:-1]), sizes[-1])

    def stored(self, parameter: Any) -> np.ndarray:
        """The tensor as the file stores it."""
        view = self.view(np.asarray(parameter))
        return np.ascontiguousarray(view.reshape(self.stored_shape(parameter.shape)))

    def slices(self, index: Index, shape: tuple[int, ...]) -> Index:
        """Slices of the tensor for a shard of the parameter; inner axes of `view` are complete."""
        axes = list(zip(shape, index, strict=True))
        if isinstance(self.slot, int):
            del axes[-2]
        if self.path.endswith("kernel"):
            axes = [*axes[1:], axes[0]]
        (size, first), (_, last) = axes[0], axes[-1]
        rows, *columns = self.stored_shape(shape)
        taken, inner = range(size)[first], rows // size
        return (slice(taken.start * inner, taken.stop * inner), *[last for _ in columns])


def parts_of(path: str, names: Names) -> list[Part]:
    """Tensors that make up a parameter."""
    return [Part(name, path, slot) for name, slot in tensors_of(path, names)]


class TensorSource:
    """An opened file or directory of tensors: shapes are known, no tensor has been read."""

    path: AnyPath
    config: LlamaConfig
    names: Names  # column of the table that names the tensors
    agreement_E: tuple[float, ...] | None = None  # as in `GenerationDefaults`, if it is known
    is_int8 = False  # whether matrices may be integers with scales
    tensors: Mapping[str, tuple[AnyPath, Any]]  # file and unread tensor, by name in the file
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor

    def read(self, name: str) -> Any:
        """One tensor, to be sliced: in its stored dtype, or in float32 from a GGUF file. Raises
        CheckpointError for a dtype that weights can't have."""
        raise NotImplementedError

    def where(self, name: str) -> str:
        """File and name of a tensor, for messages."""
        file = self.tensors[name][0] if name in self.tensors else self.path
        return f"{file}: tensor {name!r}"

    def shape(self, dtype: DTypeLike) -> Llama:
        """The model's shapes, with a Block per layer."""
        return jax.eval_shape(lambda: Llama(self.config, rngs=nnx.Rngs(0), dtype=dtype))

    def leaves(
        self, *, dtype: np.dtype, track: Track, mesh: Mesh | None, change: Change
    ) -> dict[str, Array]:
        """The parameters by path; each is created in its final sharding, and changed at once.

        The host holds its shards of one parameter at a time, and reads each once.
        """
        config = self.config
        if config.num_layers > len(self.shapes):  # check before building that many layers
            raise CheckpointError(
                f"{self.path}: the config has {config.num_layers} layers, "
                f"but {len(self.shapes)} tensors: correct the number of layers"
            )
        shapes = {path: leaf.shape for path, leaf in named_leaves(self.shape(dtype)).items()}
        self._check(shapes)
        found: dict[str, Array] = {}
        for path in track(list(shapes)):
            shape, is_rounded = shapes[path], self.is_rounded(path)
            own = np.dtype(np.int8) if is_rounded else dtype
            array = read_parameter(self, path, shape, own, sharding_of(path, shape, mesh))
            if is_rounded:
                scale = read_parameter(self, *scale_of(path, shape), np.dtype(np.float32), None)
                array = Rounded(array, scale)
            found |= change(path, array)
        return found

    def is_rounded(self, path: str) -> bool:
        """Whether the file has int8 weights for this parameter, with scales."""
        names = [f"{part.tensor}_scale" for part in parts_of(path, self.names)]
        return self.is_int8 and all(name in self.shapes for name in names)

    def _check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless tensor names and shapes are exactly the model's."""
        stored = {
            part.tensor: part.stored_shape(shape)
            for path, shape in wanted.items()
            for part in parts_of(path, self.names)
        }
        if missing := [name for name in stored if name not in self.shapes]:
            raise CheckpointError(
                f"{self.where(missing[0])}: tensor is missing ({len(missing)} of {len(stored)} "
                "are): the checkpoint is incomplete or its config is of another model"
            )
        for path, shape in wanted.items():
            if self.is_rounded(path):
                name, sizes = scale_of(path, shape)
                scales = parts_of(name, self.names)
                stored |= {part.tensor: part.stored_shape(sizes) for part in scales}
        head, embedding = (parts_of(name, self.names)[0].tensor for name in ("head", "embedding"))
        if self.config.tie_embeddings and head in self.shapes:
            stored[head] = stored[embedding]
            if not np.array_equal(self.read(head)[:], self.read(embedding)[:]):
                raise CheckpointError(
                    f"{self.where(head)}: differs from {embedding}, but the config ties them: "
                    "set tie_word_embeddings to false to use this head, or remove the tensor"
                )
        for name, shape in self.shapes.items():
            expected = stored.get(name, "no such tensor")
            if shape != expected and not _DERIVED.fullmatch(name):
                raise CheckpointError(
                    f"{self.where(name)}: shape {shape}, but the config expects {expected}: the "
                    "config is of another model, or a variant that is not supported"
                )


def scale_of(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Path and shape of the scales of an int8 parameter (lsjax/model/int8.py)."""
    return ("head.scale", shape[:1]) if path == "head" else (f"{path}_scale", shape[1:])


def read_parameter(
    source: TensorSource,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: NamedSharding | None,
) -> Array:
    """A parameter of the file on its devices. Raises CheckpointError as `parameter_reader` does."""
    read = parameter_reader(source, path, shape, dtype)
    if place is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, place, read)


def parameter_reader(
    source: TensorSource, path: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """Returns a reader of one parameter's shards, which reads each once, tensor by tensor.

    The reader raises CheckpointError for values that are not finite.
    """
    parts = [(part, source.read(part.tensor)) for part in parts_of(path, source.names)]
    shards: dict[str, np.ndarray] = {}

    def read(index: Index) -> np.ndarray:
        if str(index) in shards:  # another device holds it too
            return shards[str(index)]
        taken = (range(size)[some] for size, some in zip(shape, index, strict=True))
        shard = shards[str(index)] = np.zeros([len(some) for some in taken], dtype)
        for part, tensor in parts:
            view, (rows, *columns) = part.view(shard), part.slices(index, shape)
            inner, bad = (rows.stop - rows.start) // len(view), 0
            # Few rows at a time: a head is not in memory twice.
            size = max(1, AT_ONCE * len(view) // view.size)
            for at in range(0, len(view), size):
                some = view[at : at + size]
                first = rows.start + at * inner
                taken = slice(first, first + len(some) * inner), *columns
                with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
                    some[...] = tensor[taken].reshape(some.shape)
                bad += some.size - np.count_nonzero(np.isfinite(some))
            if bad:
                where = f"{source.where(part.tensor)}: {bad} of {view.size} values are "
                raise CheckpointError(where + NOT_FINITE.format(dtype.name))
        return shard

    return read
