"""Converts config.json to a LlamaConfig and back; GGUF metadata is read under the same keys.

Each key is in one table: FIELDS, NEUTRAL (keys with values that change nothing) or HARMLESS.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import ConfigError, LlamaConfig, RopeScaling, check
from lsjax.data.files import read_json

log = logging.getLogger(__name__)

# Field of LlamaConfig, and transformers' default.
FIELDS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32_000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11_008),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "num_key_value_heads": ("num_kv_heads", None),  # num_attention_heads
    "head_dim": ("head_dim", None),  # hidden_size / num_attention_heads
    "max_position_embeddings": ("max_context", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "initializer_range": ("init_std", 0.02),
}
# Values besides null that change nothing; others change the computation and are rejected.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping"), ()),
    **dict.fromkeys(("quantization_config", "query_pre_attn_scalar", "scale_depth"), ()),
    **dict.fromkeys(("alibi", "qk_norm", "use_qk_norm"), (False,)),
    **dict.fromkeys(("rope_interleaved", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "logit_scale"), (1.0,)),
    **dict.fromkeys(("logits_scaling", "residual_multiplier", "rotary_pct", "scale_emb"), (1.0,)),
    **dict.fromkeys(("num_experts", "num_local_experts"), (0, 1)),
    "hidden_act": ("silu",),
    "no_rope_layers": ([],),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "sliding_window": (),
}
_ORIGINAL = "original_max_position_embeddings"
# Keys that are read below, and those about loading, training, generation and labels.
HARMLESS = frozenset(
    f"""
    architectures model_type rope_parameters rope_scaling rope_theta {_ORIGINAL}
    _attn_implementation _name_or_path assistant_early_exit attention_dropout bos_token_id do_sample
    dtype eos_token_id id2label is_decoder is_encoder_decoder is_llama_config label2id max_length
    max_sequence_length num_assistant_tokens output_attentions output_hidden_states pad_token_id
    pretraining_tp return_dict temperature tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


def read_config_json(directory: Path) -> LlamaConfig:
    """Reads config.json as transformers does: rope keys of version 4 or 5, the same defaults.

    Raises CheckpointError if the config is missing, invalid, or of an unsupported model.
    """
    file = directory / "config.json"
    if not file.is_file():
        ggufs = sorted(found.name for found in directory.glob("*.gguf"))
        fix = f"give {ggufs[0]} itself" if ggufs else "give the directory of a complete model"
        raise CheckpointError(f"{file}: does not exist: {fix}")
    try:
        return llama_config(read_json(file, CheckpointError), str(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def llama_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """The LlamaConfig of a config.json; keys that are null count as missing.

    where: the file, for the warning about unknown keys. Raises ConfigError.
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    architectures = raw.get("architectures") or (
        ["LlamaForCausalLM"] if raw.get("model_type") == "llama" else raw.get("model_type")
    )
    check(
        architectures == ["LlamaForCausalLM"],
        f"architecture {architectures!r}; only ['LlamaForCausalLM'] is supported",
    )
    for key in raw.keys() & NEUTRAL.keys():
        check(
            raw[key] in NEUTRAL[key],
            f"{key} is {raw[key]!r}, which changes the computation and is not supported: use a "
            f"checkpoint in which it is {' or '.join(map(repr, NEUTRAL[key])) or 'null'}",
        )
    unknown = sorted(raw.keys() - FIELDS.keys() - NEUTRAL.keys() - HARMLESS)
    if unknown:
        log.warning("%s: unknown keys are ignored: %s", where, ", ".join(unknown))
    fields = {field: raw.get(key, default) for key, (field, default) in FIELDS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        with suppress(TypeError, ZeroDivisionError):  # LlamaConfig reports the bad value
            fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    theta, scaling = _read_rope(raw)
    return LlamaConfig(**fields, rope_theta=theta, rope_scaling=scaling)


def _read_rope(raw: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling, from rope_scaling (version 4), else from rope_parameters (version 5)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"rope_scaling is {rope!r}, but must be an object")
    partial = rope.get("partial_rotary_factor", 1.0)
    check(partial == 1.0, f"partial_rotary_factor {partial!r} is not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta", 1e4))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    check(kind in ("linear", "llama3"), f"rope type {kind!r}; only linear and llama3 are supported")
    names = ("factor", "low_freq_factor", "high_freq_factor")[: 3 if kind == "llama3" else 1]
    for name in names:
        check(rope.get(name) is not None, f"rope {name} is missing, but type {kind!r} needs it")
    values = {name: rope[name] for name in names}
    if kind == "llama3":
        context = raw.get("max_position_embeddings", 2048)
        values["original_context"] = raw.get(_ORIGINAL, rope.get(_ORIGINAL, context))
    return theta, RopeScaling(kind=kind, **values)


def to_config_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """config.json for transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5."""
    scaling, rope = None, config.rope_scaling
    if rope is not None:
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            scaling["low_freq_factor"] = rope.low_freq_factor
            scaling["high_freq_factor"] = rope.high_freq_factor
            scaling[_ORIGINAL] = rope.original_context
    theta = {"rope_theta": config.rope_theta}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{key: getattr(config, field) for key, (field, _) in FIELDS.items()},
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | theta,
        "torch_dtype": str(dtype),
    }
