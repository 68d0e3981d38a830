"""config.json of Hugging Face directories: into a LlamaConfig, and back."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.checkpoints.tensors import CheckpointError, read_json, take
from lsjax.config import ConfigError, LlamaConfig, RopeScaling

log = logging.getLogger(__name__)

# Key of config.json, field of LlamaConfig, and the default of transformers.
_FIELDS: tuple[tuple[str, str, type, Any], ...] = (
    ("vocab_size", "vocab_size", int, 32_000),
    ("hidden_size", "hidden_size", int, 4096),
    ("intermediate_size", "intermediate_size", int, 11_008),
    ("num_hidden_layers", "num_layers", int, 32),
    ("num_attention_heads", "num_heads", int, 32),
    ("num_key_value_heads", "num_kv_heads", int, None),  # num_attention_heads
    ("head_dim", "head_dim", int, None),  # hidden_size / num_attention_heads
    ("max_position_embeddings", "max_context", int, 2048),
    ("rms_norm_eps", "norm_eps", float, 1e-6),
    ("tie_word_embeddings", "tie_embeddings", bool, False),
    ("attention_bias", "attention_bias", bool, False),
    ("mlp_bias", "mlp_bias", bool, False),
    ("initializer_range", "init_std", float, 0.02),
)
# Other keys that are read, or written for transformers.
_ORIGINAL = "original_max_position_embeddings"
READ = {key for key, *_ in _FIELDS} | {
    *("architectures", "model_type", "hidden_act", "quantization_config", "partial_rotary_factor"),
    *("rope_parameters", "rope_scaling", "rope_theta", _ORIGINAL),
}
# Keys that change the computation and are not supported, with the values beside null that change
# nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping"), ()),
    **dict.fromkeys(("query_pre_attn_scalar", "scale_depth", "sliding_window"), ()),
    **dict.fromkeys(("alibi", "qk_norm", "use_qk_norm"), (False,)),
    **dict.fromkeys(("rope_interleaved", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "logit_scale"), (1.0,)),
    **dict.fromkeys(("logits_scaling", "residual_multiplier", "rotary_pct", "scale_emb"), (1.0,)),
    **dict.fromkeys(("num_experts", "num_local_experts"), (0, 1)),
    "no_rope_layers": ([],),
    "pruned_heads": ({},),
}
# Keys about loading, training, generation and labels, which transformers writes or others add.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    assistant_early_exit attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length no_repeat_ngram_size num_assistant_tokens num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


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

    fields = {field: take(raw, key, kind, known, file) for key, field, kind, known in _FIELDS}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // max(fields["num_heads"], 1)
    theta, scaling = _read_rope(raw, file)
    try:
        return LlamaConfig(**fields, rope_theta=theta, rope_scaling=scaling)
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
    if kind == "default":
        return theta, None
    needed = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor")}
    if kind not in needed:
        known = ", ".join(["default", *needed])
        raise CheckpointError(f"{where}: type {kind!r}; only {known} are supported")
    values: dict[str, Any] = {}
    for key in ("factor", *needed[kind]):
        values[key] = take(rope, key, float, None, where)
        if values[key] is None:
            raise CheckpointError(f"{where}: {key} is missing, and type {kind!r} needs it")
    if kind == "llama3":
        context = take(raw, "max_position_embeddings", int, 2048, file)
        nested = take(rope, _ORIGINAL, int, context, where)
        values["original_context"] = take(raw, _ORIGINAL, int, nested, file)
    try:
        return theta, RopeScaling(kind=kind, **values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def to_config_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """Read alike by transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5."""
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
        **{key: getattr(config, field) for key, field, *_ in _FIELDS},
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | theta,
        "torch_dtype": str(dtype),
    }


def check_keys(raw: Mapping[str, Any], file: Path) -> None:
    """Warns of each key that is in none of the lists.

    Raises CheckpointError for a key that would change the computation.
    """
    for key, value in raw.items():
        if key in NEUTRAL:
            if value is not None and value not in NEUTRAL[key]:
                raise CheckpointError(
                    f"{file}: {key} is {value!r}, which changes the computation and is not "
                    "supported: use a checkpoint in which it is null"
                )
        elif key not in READ | HARMLESS:
            log.warning("%s: key %r is unknown and ignored", file, key)
