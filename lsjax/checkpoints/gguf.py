"""GGUF files of llama.cpp: metadata into a LlamaConfig, tensors dequantised one at a time."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lsjax.checkpoints.tensors import CheckpointError, TensorSource, default_head_dim
from lsjax.config import ConfigError, LlamaConfig, RopeScaling, check
from lsjax.data.files import open_gguf
from lsjax.model.rope import rope_frequencies

_INTERLEAVED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource(TensorSource):
    """A GGUF file.

    Raises:
        CheckpointError: not a whole little-endian GGUF of version 2 or 3 with a Llama in it, or
            the `gguf` package is not installed.
    """

    names = "gguf"

    def __init__(self, path: Path):
        self.path, self._reader = path, open_gguf(path, CheckpointError)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shapes = {
            name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self._tensors.items()
        }
        try:
            self.config = self._with_llama3_scaling(self._read_config())
        except (ConfigError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def where(self, name: str) -> str:
        """File and name."""
        return f"{self.path}: tensor {name!r}"

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
        interleaved = _INTERLEAVED.fullmatch(name)
        if interleaved is None:
            return value
        queries = interleaved[1] == "q"
        return _half_split(value, self.config.num_heads if queries else self.config.num_kv_heads)

    def _get(self, key: str, *default: Any) -> Any:
        """A value of the metadata. Raises ConfigError where it and a default are missing."""
        field = self._reader.get_field(key)
        if field is None:
            check(bool(default), f"{key} is missing from the metadata: convert again")
            return default[0]
        value = field.contents()
        # 1e-05, not the 9.999999747e-06 next to it.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _read_config(self) -> LlamaConfig:
        get = self._get
        architecture = get("general.architecture")
        check(
            architecture == "llama",
            f"general.architecture is {architecture!r}; only 'llama' is supported",
        )
        width, heads = get("llama.embedding_length"), get("llama.attention.head_count")
        head_dim = get("llama.attention.key_length", default_head_dim(width, heads))
        for key, *supported in (
            ("llama.expert_count", 0, 1),
            ("split.count", 0, 1),  # llama-gguf-split --merge joins the files
            ("llama.attention.value_length", head_dim),
            ("llama.rope.dimension_count", head_dim),
        ):
            found = get(key, supported[0])
            check(found in supported, f"{key} is {found!r}; only {supported[-1]} is supported")
        return LlamaConfig(
            vocab_size=get("llama.vocab_size", self.shapes.get("token_embd.weight", (0,))[0]),
            hidden_size=width,
            intermediate_size=get("llama.feed_forward_length"),
            num_layers=get("llama.block_count"),
            num_heads=heads,
            num_kv_heads=get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=get("llama.context_length"),
            rope_theta=get("llama.rope.freq_base", 1e4),
            rope_scaling=self._linear_scaling(),
            norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in self.shapes,
            attention_bias="blk.0.attn_q.bias" in self.shapes,
            mlp_bias="blk.0.ffn_gate.bias" in self.shapes,
        )

    def _linear_scaling(self) -> RopeScaling | None:
        kind = self._get("llama.rope.scaling.type", None)
        old = self._get("llama.rope.scale_linear", 1.0)  # the key of 2023
        factor = self._get("llama.rope.scaling.factor", old)
        check(
            kind in (None, "none", "linear"),
            f"llama.rope.scaling.type is {kind!r}; only 'linear' is supported",
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


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two halves of each head's rows [N*H, ...]."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
