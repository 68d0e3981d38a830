"""Hugging Face directories: config.json, generation_config.json and safetensors, in and out."""

import dataclasses
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsjax.checkpoints.huggingface_keys import check_keys
from lsjax.checkpoints.safetensors_files import read_entries, read_json, write_json, write_weights
from lsjax.checkpoints.tensors import CheckpointError, Track, take
from lsjax.config import ConfigError, LlamaConfig, RopeScaling, split_step
from lsjax.model.llama import Llama, unstacked

if TYPE_CHECKING:
    from lsjax.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint says about how to decode it; None where it says nothing."""

    exit_layer: int | None = None  # layers that draft, E
    num_draft_tokens: int | None = None  # drafted per round, d


def read_generation_defaults(path: str | Path) -> GenerationDefaults:
    """From generation_config.json, else config.json; nothing for a GGUF file.

    Raises:
        CheckpointError: a file that is not JSON, or a value that is not a number of at least 1.
    """
    path, found = split_step(path)[0], {}
    names = {"exit_layer": "assistant_early_exit", "num_draft_tokens": "num_assistant_tokens"}
    for file in (path / "generation_config.json", path / "config.json"):
        raw = read_json(file) if file.is_file() else {}
        for field, name in names.items():
            value = take(raw, name, int, None, file)
            if value is not None and value < 1:
                raise CheckpointError(f"{file}: {name} is {value}, but must be at least 1")
            if found.get(field) is None:
                found[field] = value
    return GenerationDefaults(**found)


class HuggingFaceSource:
    """A directory with config.json and safetensors in one file or several (a `TensorSource`)."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_config_json(path)
        self._entries = read_entries(path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def where(self, name: str) -> str:
        """File and name."""
        file = self._entries[name].file if name in self._entries else self.path
        return f"{file}: tensor {name!r}"

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        return self._entries[name].read()


def read_config_json(directory: Path) -> LlamaConfig:
    """config.json as transformers reads it: the rope keys of version 4 or 5, the same defaults."""
    file = directory / "config.json"
    if not file.is_file():
        ggufs = sorted(found.name for found in directory.glob("*.gguf"))
        fix = f"give {ggufs[0]} itself" if ggufs else "give the directory of a whole model"
        raise CheckpointError(f"{file}: does not exist: {fix}")
    raw = read_json(file)
    architectures = raw.get("architectures") or (
        ["LlamaForCausalLM"] if raw.get("model_type") == "llama" else raw.get("model_type")
    )
    if architectures != ["LlamaForCausalLM"]:
        raise CheckpointError(
            f"{file}: architecture {architectures!r}; only ['LlamaForCausalLM'] is supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{file}: hidden_act {raw['hidden_act']!r}; only 'silu' is supported")
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{file}: quantization_config is not supported: dequantise it first")
    check_keys(raw, file)

    def integer(key: str, default: int) -> int:
        return take(raw, key, int, default, file)

    width, heads = integer("hidden_size", 4096), integer("num_attention_heads", 32)
    theta, scaling = _read_rope(raw, file)
    try:
        return LlamaConfig(
            vocab_size=integer("vocab_size", 32_000),
            hidden_size=width,
            intermediate_size=integer("intermediate_size", 11_008),
            num_layers=integer("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=integer("num_key_value_heads", heads),
            head_dim=integer("head_dim", width // max(heads, 1)),
            max_context=integer("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=take(raw, "rms_norm_eps", float, 1e-6, file),
            tie_embeddings=take(raw, "tie_word_embeddings", bool, False, file),
            attention_bias=take(raw, "attention_bias", bool, False, file),
            mlp_bias=take(raw, "mlp_bias", bool, False, file),
            init_std=take(raw, "initializer_range", float, 0.02, file),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_rope(raw: Mapping[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """Theta, and scaling: in rope_scaling (version 4) or rope_parameters (5), the former first."""
    rope = take(raw, "rope_scaling", dict, {}, file) or take(raw, "rope_parameters", dict, {}, file)
    where = f"{file}: rope"
    theta = take(rope, "rope_theta", float, take(raw, "rope_theta", float, 1e4, file), where)
    for table in (raw, rope):
        if take(table, "partial_rotary_factor", float, 1.0, where) != 1.0:
            raise CheckpointError(f"{where}: partial_rotary_factor is not supported")
    kind = take(rope, "rope_type", str, take(rope, "type", str, "default", where), where)
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needed:
        raise CheckpointError(f"{where}: type {kind!r}; only {', '.join(needed)} are supported")
    values = {key: take(rope, key, float, None, where) for key in needed[kind]}
    for key, value in values.items():
        if value is None:
            raise CheckpointError(f"{where}: {key} is missing, and type {kind!r} needs it")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        key = "original_max_position_embeddings"
        fallback = take(raw, "max_position_embeddings", int, 2048, file)
        values["original_context"] = take(
            raw, key, int, take(rope, key, int, fallback, where), file
        )
    try:
        return theta, RopeScaling(kind=kind, **values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def save(
    model: Llama,
    directory: str | Path,
    *,
    generation: GenerationDefaults | None = None,
    tokenizer: "Tokenizer | None" = None,
    shard_bytes: int = 5_000_000_000,
    track: Track = iter,
) -> None:
    """Writes a directory that transformers and `load` read: all of it, or nothing.

    Args:
        model: stacked or not; written in the dtype of its parameters.
        directory: new or empty; it appears under its name when everything is in it.
        generation: how to decode it, for generation_config.json.
        tokenizer: gives its files and the ids of the begin and end tokens.
        shard_bytes: a file is not made longer than this, unless by a single tensor.
        track: wraps the sequence of tensors that is written, for a progress bar.
    Raises:
        CheckpointError: the directory holds something.
    """
    directory = Path(directory).resolve()
    check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        ids = _special_ids(tokenizer)
        write_json(partial / "config.json", _config_json(model) | ids)
        defaults = generation or GenerationDefaults()
        early = {
            "assistant_early_exit": defaults.exit_layer,
            "num_assistant_tokens": defaults.num_draft_tokens,
        }
        said = {key: value for key, value in (ids | early).items() if value is not None}
        write_json(partial / "generation_config.json", said)
        if tokenizer is not None:
            tokenizer.save(partial)
        write_weights(unstacked(model), partial, shard_bytes, track)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_destination(directory: Path) -> None:
    """Raises CheckpointError unless the directory is new or empty."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: is not an empty directory: choose a new one")


def _special_ids(tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """Null where unknown: transformers would put in Llama-2's 1 and 2."""
    eos = list(tokenizer.eos_ids) if tokenizer else []
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
    }


def _config_json(model: Llama) -> dict[str, Any]:
    """Read alike by transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5."""
    config = model.config
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        scaling = {"rope_type": scaling.pop("kind")} | scaling
        original = scaling.pop("original_context")
        if config.rope_scaling.kind == "llama3":
            scaling["original_max_position_embeddings"] = original
        else:
            scaling = {key: scaling[key] for key in ("rope_type", "factor")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.init_std,
        "torch_dtype": str(model.dtype),
    }
