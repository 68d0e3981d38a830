"""From the tensors of a file to a Llama: what every checkpoint format shares.

A format (huggingface.py, gguf.py) offers its tensors one by one, under their Hugging Face names,
as a `TensorSource`; `TENSORS` says which parameter each of them is a part of. Nothing is ever
filled in: a tensor that is missing, strange or not finite is a `CheckpointError`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lsjax.config import LlamaConfig
from lsjax.model.llama import Llama


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line with the file, the values, the fix."""


@runtime_checkable
class TensorSource(Protocol):
    """An opened checkpoint: what it holds is known, nothing large has been read."""

    path: Path
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by its Hugging Face name

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype, or in float32 if it was quantised."""
        ...

    def where(self, name: str) -> str:
        """The file that holds the tensor, and its name there, for messages."""
        ...


class Part(NamedTuple):
    """A tensor of the file as a part of one of our parameters."""

    tensor: str  # its Hugging Face name
    parameter: str  # path in Llama
    slot: int | slice | None  # where in the last but one axis; None: it is the whole parameter

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of this part of a parameter."""
        if self.slot is None:
            return parameter_shape
        *lead, slots, last = parameter_shape
        taken = range(slots)[self.slot]
        return (*lead, last) if isinstance(taken, int) else (*lead, len(taken), last)

    def stored_shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor in the file: kernels are [out, in] there, biases flat."""
        part = self.shape(parameter_shape)
        if self.is_kernel:
            return (math.prod(part[1:]), part[0])
        return (math.prod(part),) if self.parameter.endswith("bias") else part

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """This part of a parameter, without a copy."""
        return parameter if self.slot is None else parameter[..., self.slot, :]

    @property
    def is_kernel(self) -> bool:
        """Whether the file holds it transposed."""
        return self.parameter.endswith("kernel")


_LAYER = "model.layers.{}."
_QKV = "layers.{}.attention.qkv."
_GATE_UP = "layers.{}.feed_forward.gate_up."
# A K/V head's slots are its G queries, its key and its value.
TENSORS = (
    Part("model.embed_tokens.weight", "embedding", None),
    Part(_LAYER + "input_layernorm.weight", "layers.{}.attention_norm.scale", None),
    Part(_LAYER + "self_attn.q_proj.weight", _QKV + "kernel", slice(None, -2)),
    Part(_LAYER + "self_attn.k_proj.weight", _QKV + "kernel", -2),
    Part(_LAYER + "self_attn.v_proj.weight", _QKV + "kernel", -1),
    Part(_LAYER + "self_attn.q_proj.bias", _QKV + "bias", slice(None, -2)),
    Part(_LAYER + "self_attn.k_proj.bias", _QKV + "bias", -2),
    Part(_LAYER + "self_attn.v_proj.bias", _QKV + "bias", -1),
    Part(_LAYER + "self_attn.o_proj.weight", "layers.{}.attention.out.kernel", None),
    Part(_LAYER + "self_attn.o_proj.bias", "layers.{}.attention.out.bias", None),
    Part(_LAYER + "post_attention_layernorm.weight", "layers.{}.feed_forward_norm.scale", None),
    Part(_LAYER + "mlp.gate_proj.weight", _GATE_UP + "kernel", 0),
    Part(_LAYER + "mlp.up_proj.weight", _GATE_UP + "kernel", 1),
    Part(_LAYER + "mlp.gate_proj.bias", _GATE_UP + "bias", 0),
    Part(_LAYER + "mlp.up_proj.bias", _GATE_UP + "bias", 1),
    Part(_LAYER + "mlp.down_proj.weight", "layers.{}.feed_forward.down.kernel", None),
    Part(_LAYER + "mlp.down_proj.bias", "layers.{}.feed_forward.down.bias", None),
    Part("model.norm.weight", "norm.scale", None),
    Part("lm_head.weight", "head", None),
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Constants that transformers < 4.32 and llama.cpp store beside the weights.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn_rot_embd\.weight|rope_freqs\.weight)")

Track = Callable[[Sequence[Any]], Iterable[Any]]  # hands a sequence on, and may show how far


def load(path: str | Path, *, dtype: Any = None, track: Track = iter) -> Llama:
    """The model in a Hugging Face directory or a GGUF file, with a Block per layer.

    Args:
        path: the directory, or the file.
        dtype: of the parameters, whatever the file has; float32 if not given.
        track: wraps the sequence of parameters that is walked, for a progress bar.
    Raises:
        CheckpointError: whatever is wrong with the file, in one line.
    """
    return assemble(open_source(path), dtype=jnp.float32 if dtype is None else dtype, track=track)


def open_source(path: str | Path) -> TensorSource:
    """Opens a checkpoint of either format and checks all but the numbers in it."""
    # Here, because the formats import this module.
    from lsjax.model.gguf import GGUFSource
    from lsjax.model.huggingface import HuggingFaceSource

    path = Path(path)
    if path.is_dir():
        return HuggingFaceSource(path)
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


def assemble(source: TensorSource, *, dtype: Any, track: Track = iter) -> Llama:
    """Builds the model parameter by parameter, each straight in its dtype."""
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
    arrays = [
        nnx.Param(jnp.asarray(read_parameter(source, parts[name], wanted[name], dtype)))
        for name in track(list(wanted))
    ]
    return jax.tree.unflatten(structure, arrays)


def named_parameters(model: Llama) -> tuple[dict[str, nnx.Param], jax.tree_util.PyTreeDef]:
    """Parameters by path ("layers.0.attention.qkv.kernel"), and the tree to put such in again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return named, structure


def model_parts(config: LlamaConfig) -> Iterable[Part]:
    """`TENSORS` for every layer; also those that this config has no parameter for."""
    for part in TENSORS:
        layers = config.num_layers if "{}" in part.tensor else 1
        for layer in range(layers):
            yield Part(part.tensor.format(layer), part.parameter.format(layer), part.slot)


def read_parameter(
    source: TensorSource, parts: Sequence[Part], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """One parameter, filled tensor by tensor."""
    parameter = np.zeros(shape, dtype)
    for part in parts:
        tensor, view = source.read(part.tensor), part.view(parameter)
        if part.is_kernel:
            tensor = np.moveaxis(tensor.reshape(*view.shape[1:], view.shape[0]), -1, 0)
        with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
            view[...] = tensor.reshape(view.shape)
        finite = np.isfinite(view)
        if not finite.all():
            in_file = not np.isfinite(tensor).all()
            problem = (
                "values are NaN or infinite: the checkpoint is damaged"
                if in_file
                else f"values are too large for {dtype.name}: use float32 or bfloat16"
            )
            count = view.size - np.count_nonzero(finite)
            raise CheckpointError(f"{source.where(part.tensor)}: {count} of {view.size} {problem}")
    return parameter


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
