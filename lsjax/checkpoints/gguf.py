"""GGUF files of llama.cpp: metadata into a LlamaConfig, tensors dequantised one at a time."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lsjax.checkpoints.tensors import CheckpointError, take
from lsjax.config import ConfigError, LlamaConfig, RopeScaling
from lsjax.model.rope import rope_frequencies

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?P<layer>blk\.\d+\.)?(?P<name>\w+)\.(?P<kind>weight|bias)")
_GGUF_NAMES = {theirs: name for name, theirs in _NAMES.items()}
_HUGGINGFACE_TENSOR = re.compile(
    r"(model\.layers\.(?P<layer>\d+)\.)?"
    rf"(?P<name>{'|'.join(map(re.escape, _GGUF_NAMES))})\.(?P<kind>weight|bias)"
)
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource:
    """A GGUF file (a `TensorSource`).

    Raises:
        CheckpointError: not a whole little-endian GGUF of version 2 or 3 with a Llama in it, or
            the `gguf` package is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = _open(path)
        self._tensors = {_huggingface_name(tensor.name): tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape.tolist()))
            for name, tensor in self._tensors.items()
        }
        self.config = self._read_config(_Metadata(reader, path))

    def where(self, name: str) -> str:
        """The file, and the name of the tensor in it."""
        held = self._tensors.get(name)
        return f"{self.path}: tensor {held.name if held else _gguf_name(name)!r}"

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32 if it was quantised; queries and keys in half-split order."""
        from gguf import quants

        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind == "BF16":
            value = tensor.data.view(ml_dtypes.bfloat16)
        elif kind in ("F32", "F16", "F64"):
            value = tensor.data
        else:
            try:
                with np.errstate(over="ignore", invalid="ignore"):  # found by whoever fills it in
                    value = quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.where(name)}: type {kind} cannot be dequantised: use a GGUF of "
                    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or a K-quant"
                ) from error
        if "self_attn.q_proj." in name:
            return _half_split(value, self.config.num_heads)
        if "self_attn.k_proj." in name:
            return _half_split(value, self.config.num_kv_heads)
        return value

    def _read_config(self, metadata: "_Metadata") -> LlamaConfig:
        architecture = metadata.get("general.architecture", str)
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path}: general.architecture is {architecture!r}; only 'llama' is supported"
            )
        for key in ("llama.expert_count", "split.count"):
            if metadata.get(key, int, 0) > 1:
                raise CheckpointError(
                    f"{self.path}: {key} is {metadata.get(key, int)}: mixtures of experts and "
                    "split files are not supported (llama-gguf-split --merge joins the latter)"
                )
        width = metadata.get("llama.embedding_length", int)
        heads = metadata.get("llama.attention.head_count", int)
        head_dim = metadata.get("llama.attention.key_length", int, width // max(heads, 1))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if metadata.get(key, int, head_dim) != head_dim:
                raise CheckpointError(
                    f"{self.path}: {key} is {metadata.get(key, int)}; "
                    f"only the head size, {head_dim}, is supported"
                )
        embedding = self.shapes.get("model.embed_tokens.weight", (0,))
        try:
            config = LlamaConfig(
                vocab_size=metadata.get("llama.vocab_size", int, embedding[0]),
                hidden_size=width,
                intermediate_size=metadata.get("llama.feed_forward_length", int),
                num_layers=metadata.get("llama.block_count", int),
                num_heads=heads,
                num_kv_heads=metadata.get("llama.attention.head_count_kv", int, heads),
                head_dim=head_dim,
                max_context=metadata.get("llama.context_length", int),
                rope_theta=metadata.get("llama.rope.freq_base", float, 1e4),
                rope_scaling=self._linear_scaling(metadata),
                norm_eps=metadata.get("llama.attention.layer_norm_rms_epsilon", float),
                tie_embeddings="lm_head.weight" not in self.shapes,
                attention_bias="model.layers.0.self_attn.q_proj.bias" in self.shapes,
                mlp_bias="model.layers.0.mlp.gate_proj.bias" in self.shapes,
            )
            return self._with_llama3_scaling(config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _linear_scaling(self, metadata: "_Metadata") -> RopeScaling | None:
        kind = metadata.get("llama.rope.scaling.type", str, None)
        old = metadata.get("llama.rope.scale_linear", float, 1.0)  # the key of 2023
        factor = metadata.get("llama.rope.scaling.factor", float, old)
        if kind not in (None, "none", "linear"):
            raise CheckpointError(
                f"{self.path}: llama.rope.scaling.type is {kind!r}; only 'linear' is supported"
            )
        stretched = kind == "linear" or (kind is None and factor != 1.0)
        return RopeScaling(kind="linear", factor=factor) if stretched else None

    def _with_llama3_scaling(self, config: LlamaConfig) -> LlamaConfig:
        """Llama 3's scaling is kept as a divisor for each frequency: which scaling made them?"""
        if _ROPE_FACTORS not in self._tensors:
            return config
        divisors = np.asarray(self.read(_ROPE_FACTORS), np.float32)
        if config.rope_scaling is None and (divisors == 1).all():
            return config
        factor = float(divisors.max())
        if config.rope_scaling is None and 1 <= factor < math.inf:
            scaled = dataclasses.replace(
                config, rope_scaling=RopeScaling(kind="llama3", factor=factor)
            )
            wanted = rope_frequencies(config) / rope_frequencies(scaled)
            if divisors.shape == wanted.shape and np.allclose(divisors, wanted, rtol=1e-4):
                return scaled
        raise CheckpointError(
            f"{self.where(_ROPE_FACTORS)}: its divisors {divisors.min():g} to {factor:g} are not "
            "those of Llama 3 (factors 1 and 4, 8192 positions): convert from the original instead"
        )


class _Metadata:
    """Values by key, checked for their type."""

    def __init__(self, reader: Any, path: Path):
        self._reader, self._path = reader, path

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """Raises CheckpointError if it is of another kind, or absent and no default is given."""
        field = self._reader.get_field(key)
        if field is None and not default:
            raise CheckpointError(
                f"{self._path}: {key} is missing from the metadata: convert again"
            )
        try:
            value = None if field is None else field.contents()
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {key} is not UTF-8: damaged") from error
        if isinstance(value, float) and abs(value) < 1e30:
            value = float(str(np.float32(value)))  # 1e-05, not the 9.999999747e-06 next to it
        return take({key: value}, key, kind, *(default or (None,)), self._path)


def _open(path: Path) -> Any:
    """The gguf package's reader, once all that it reads is known to lie inside the file."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading GGUF files needs the gguf package: pip install 'lsjax[gguf]'"
        ) from error
    with path.open("rb") as file:
        head = file.read(8)
    version = int.from_bytes(head[4:8], "little")
    if len(head) == 8 and version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{path}: is a {kind} GGUF; only little-endian ones of version 2 and 3 are read"
        )

    class Reader(gguf.GGUFReader):
        """Slices beyond the end of a file are short, not errors; a huge count would loop."""

        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                size = int(count) * np.dtype(dtype).itemsize
                raise ValueError(f"{size} bytes at {offset} do not lie in its {len(self.data)}")
            return values

    try:
        reader = Reader(path)
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{path}: not a whole GGUF file ({problem}): damaged or cut short, download it again"
        ) from error
    reached, previous = reader.data_offset, None
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < reached:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.data_offset}, inside "
                f"{previous or 'the header'!r}: damaged, download it again"
            )
        reached, previous = tensor.data_offset + tensor.n_bytes, tensor.name
    return reader


def _huggingface_name(name: str) -> str:
    """The Hugging Face name of a tensor, or its own if a Llama has no such tensor."""
    match = _TENSOR.fullmatch(name)
    if match is None or match["name"] not in _NAMES:
        return name
    layer = "" if match["layer"] is None else match["layer"].replace("blk", "model.layers")
    return f"{layer}{_NAMES[match['name']]}.{match['kind']}"


def _gguf_name(name: str) -> str:
    """The inverse of `_huggingface_name`."""
    match = _HUGGINGFACE_TENSOR.fullmatch(name)
    if match is None:
        return name
    layer = "" if match["layer"] is None else f"blk.{match['layer']}."
    return f"{layer}{_GGUF_NAMES[match['name']]}.{match['kind']}"


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two halves of each head's rows [N*H, ...]."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
