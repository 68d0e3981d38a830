"""GGUF files of llama.cpp: metadata under config.json's keys, tensors dequantised one by one."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from lsjax.checkpoints.families import FULL, SLIDING, llama_config
from lsjax.checkpoints.tensors import CheckpointError, TensorSource
from lsjax.config import AnyPath, ConfigError, LlamaConfig, RopeScaling, check
from lsjax.data.tokenizer_files import gguf_parts, open_gguf
from lsjax.model.rope import rope_frequencies

# The names are also model_types of config.json, but OLMo 3 is olmo2 with a sliding window.
_ARCHITECTURES = ("llama", "olmo2", "qwen2", "qwen3", "smollm3")
# Metadata keys (after "llama.") and config.json's keys.
_KEYS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_count": "num_local_experts",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
}
# Metadata keys (after "llama.rope.scaling.") and keys of rope_scaling.
_YARN = {
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_INTERLEAVED_ROPE = ("llama", "smollm3")
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource(TensorSource):
    """A GGUF file, or all parts of a split one, whose first part has the metadata.

    path: the file, or any part. Raises CheckpointError for anything but complete little-endian
    GGUFs of version 2 or 3 of a supported architecture, or without the `gguf` package. Raises
    FileNotFoundError for a missing part.
    """

    names = "gguf"

    def __init__(self, path: AnyPath):
        self.path, parts = path, gguf_parts(path)
        readers = [open_gguf(part, CheckpointError) for part in parts]
        self.tensors, self.shapes = {}, {}
        for part, reader in zip(parts, readers, strict=True):
            for tensor in reader.tensors:
                self.tensors[tensor.name] = part, tensor
                self.shapes[tensor.name] = tuple(reversed(tensor.shape.tolist()))
        try:
            self._architecture = kind = _value(readers[0].get_field("general.architecture"))
            known = ", ".join(_ARCHITECTURES)
            check(kind in _ARCHITECTURES, f"general.architecture is {kind!r}, not one of {known}")
            own = {
                key.removeprefix(f"{kind}."): _value(field)
                for key, field in readers[0].fields.items()
                if key.startswith(f"{kind}.")
            }
            config = llama_config(self._config_json(own), str(path))
            for key in ("attention.value_length", "rope.dimension_count"):
                size = own.get(key, config.head_dim)
                good = size == config.head_dim
                check(good, f"{key} is {size!r}; only {config.head_dim} is supported")
            self.config = self._with_llama3_scaling(config)
        except (ConfigError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32; queries and keys in half-split order."""
        from gguf import quants

        _, tensor = self.tensors[name]
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # parameter_reader checks
                value = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.where(name)}: type {tensor.tensor_type.name} cannot be dequantised: use a "
                "GGUF of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or a K-quant"
            ) from error
        interleaved = _INTERLEAVED.fullmatch(name)
        if interleaved is None or self._architecture not in _INTERLEAVED_ROPE:
            return value
        # Undoes llama.cpp's interleaving of the two halves of each head's rows [N*H, ...].
        heads = self.config.num_heads if interleaved[1] == "q" else self.config.num_kv_heads
        pairs = value.reshape(heads, -1, 2, *value.shape[1:])
        return pairs.swapaxes(1, 2).reshape(value.shape)

    def _config_json(self, own: dict[str, Any]) -> dict[str, Any]:
        """The architecture's own metadata under config.json's keys; None if missing."""
        raw = {name: own.get(key) for key, name in _KEYS.items()}
        factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))  # new, of 2023
        scaling = own.get("rope.scaling.type", "none" if factor == 1 else "linear")
        rope = {"type": "default" if scaling == "none" else scaling, "factor": factor}
        if scaling == "yarn":
            rope |= {name: own.get(f"rope.scaling.{key}") for key, name in _YARN.items()}
        kind, theta = self._architecture, {"rope_theta": raw["rope_theta"]}
        if slides := own.get("attention.sliding_window_pattern"):
            kind = "olmo3"
            raw["layer_types"] = [SLIDING if one else FULL for one in slides]
            rope = {FULL: rope | theta, SLIDING: theta}
        return raw | {
            "model_type": kind,
            "vocab_size": own.get("vocab_size", self.shapes.get("token_embd.weight", (0,))[0]),
            "rope_parameters": rope,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "attention_bias": "blk.0.attn_output.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.shapes,
        }

    def _with_llama3_scaling(self, config: LlamaConfig) -> LlamaConfig:
        """Finds the Llama 3 scaling that gives the file's divisor of each frequency."""
        if _ROPE_FACTORS not in self.tensors:
            return config
        divisors = np.asarray(self.read(_ROPE_FACTORS), np.float32)
        factor = float(divisors.max())
        if config.rope_scaling is None and 1 <= factor < math.inf:
            scaling = RopeScaling(kind="llama3", factor=factor) if factor > 1 else None
            scaled = dataclasses.replace(config, rope_scaling=scaling)
            wanted = rope_frequencies(config) / rope_frequencies(scaled)
            if divisors.shape == wanted.shape and np.allclose(divisors, wanted, rtol=1e-4):
                return scaled
        raise CheckpointError(
            f"{self.where(_ROPE_FACTORS)}: its divisors {divisors.min():g} to {factor:g} are not "
            "those of Llama 3 (factors 1 and 4, 8192 positions): use the original model instead"
        )


def _value(field: Any) -> Any:
    """A metadata value; floats in the shortest spelling: 1e-05, not 9.999999747e-06."""
    value = field and field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value
