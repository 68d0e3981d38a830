"""Families: the architectures of transformers that are Llamas with a few switches.

Each key of config.json is in one table: FIELDS, a family's defaults, NEUTRAL (keys with values that
change nothing) or HARMLESS. A new family is one entry of FAMILIES. If its parameters have new
names, lsjax/model/parameters.py has them too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lsjax.config import check

# Field of LlamaConfig, and the default in transformers.
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
    "initializer_range": ("init_std", 0.02),
}
OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")  # null is a value of theirs
FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types
BIASES = ("attention_bias", "mlp_bias")


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of transformers.

    defaults: those that differ from FIELDS, and those of the family's own keys. switches: fields of
    LlamaConfig that no key sets. slides: whether a layer of a config without layer_types has the
    sliding window.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    slides: Callable[[int, Mapping[str, Any]], bool] = lambda layer, raw: True


def no_rope_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Indices of the layers without rope, by a list of 0 (without) and 1, or by an interval."""
    names = ("num_hidden_layers", "no_rope_layers", "no_rope_layer_interval")
    count, uses, interval = (raw[name] for name in names)
    if uses is None:
        check(interval > 0, f"no_rope_layer_interval is {interval}, but must be above 0")
        return tuple(range(interval - 1, count, interval))
    check(
        isinstance(uses, list) and len(uses) >= count,
        f"no_rope_layers is {uses!r}, but must have a 0 or 1 for each of {count} layers",
    )
    return tuple(layer for layer, use in enumerate(uses[:count]) if not use)


_QWEN2 = Family(
    model_type="qwen2",
    defaults=dict(vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32)
    | dict(max_position_embeddings=32_768, use_sliding_window=False, sliding_window=4096)
    | dict(max_window_layers=28, layer_types=None),
    switches=dict(qkv_bias=True),
    slides=lambda layer, raw: layer >= raw["max_window_layers"],
)
_OLMO2 = Family(
    model_type="olmo2",
    defaults=dict(vocab_size=50_304, rms_norm_eps=1e-5, attention_bias=False),
    switches=dict(qk_norm="full", norm_after=True),
)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama", defaults=dict(attention_bias=False, mlp_bias=False)
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults=dict(intermediate_size=14_336, num_key_value_heads=8)
        | dict(max_position_embeddings=131_072, sliding_window=4096),
    ),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": dataclasses.replace(
        _QWEN2,
        model_type="qwen3",
        defaults={**_QWEN2.defaults, "head_dim": 128, "attention_bias": False},
        switches=dict(qk_norm="head"),
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3",
        defaults=dict(vocab_size=128_256, hidden_size=2048, num_hidden_layers=36)
        | dict(num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=32_768)
        | dict(rope_theta=2e6, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
        | dict(use_sliding_window=False, sliding_window=None, layer_types=None)
        | dict(no_rope_layers=None, no_rope_layer_interval=4),
        slides=lambda layer, raw: layer in no_rope_layers(raw),
    ),
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": dataclasses.replace(
        _OLMO2,
        model_type="olmo3",
        defaults={**_OLMO2.defaults, "rope_theta": 5e5, "window_rope_theta": 5e5}
        | dict(sliding_window=4096, layer_types=None),
        slides=lambda layer, raw: (layer + 1) % 4 != 0,
    ),
}
# What other models need, by regular expressions of their model_type.
MISSING: Mapping[str, str] = {
    "gemma": "norm scales of 1 + w, scaled embeddings and GELU",
    "phi": "joined projections, partial rotary embeddings or layer norm",
    "qwen3_5|qwen3_next": "layers with linear attention",
    "mixtral|olmoe|deepseek|.*_moe$": "mixtures of experts",
}
# Keys of rope scaling that each type needs, and others that it may have.
SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("beta_fast", "beta_slow", "truncate", "attention_factor")),
}
# Values besides null that change nothing; others change the computation and are rejected.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping"), ()),
    **dict.fromkeys(("quantization_config", "query_pre_attn_scalar", "scale_depth"), ()),
    **dict.fromkeys(("alibi", "qk_norm", "use_qk_norm", *BIASES), (False,)),
    **dict.fromkeys(("rope_interleaved", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "logit_scale"), (1.0,)),
    **dict.fromkeys(("logits_scaling", "residual_multiplier", "rotary_pct", "scale_emb"), (1.0,)),
    **dict.fromkeys(("num_experts", "num_local_experts"), (0, 1)),
    "hidden_act": ("silu",),
    "layer_types": (),
    "no_rope_layers": ([],),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "sliding_window": (),
    "use_sliding_window": (False,),
}
ORIGINAL = "original_max_position_embeddings"
# Keys that are read below, and those about loading, training, generation and labels.
HARMLESS = frozenset(
    f"""
    architectures model_type rope_parameters rope_scaling rope_theta {ORIGINAL} max_window_layers
    _attn_implementation _name_or_path assistant_early_exit attention_dropout bos_token_id do_sample
    dtype eos_token_id id2label is_decoder is_encoder_decoder is_llama_config label2id max_length
    max_sequence_length no_rope_layer_interval num_assistant_tokens output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict temperature tokenizer_class top_k
    top_p torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)
