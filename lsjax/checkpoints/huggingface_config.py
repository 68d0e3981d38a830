"""config.json of Hugging Face directories: into a LlamaConfig, and back."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.checkpoints.tensors import CheckpointError, read_json, take
from lsjax.config import ConfigError, LlamaConfig, RopeScaling

log = logging.getLogger(__name__)

READ = frozenset(
    """
    architectures attention_bias head_dim hidden_act hidden_size initializer_range
    intermediate_size max_position_embeddings mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings partial_rotary_factor
    quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    vocab_size
    """.split()  # noqa: SIM905
)
# Keys that change the computation and are not supported, with the values beside null that change
# nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "pruned_heads": ({},),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "rotary_pct": (1.0,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
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


def to_config_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """Read alike by transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5."""
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
