"""Families: the architectures of transformers that are Llamas with a few switches.

`llama_config` reads config.json; GGUF metadata is read under the same keys. Each key is in one
table: FIELDS, a family's defaults, NEUTRAL (keys with values that change nothing) or HARMLESS. A
new family is one entry of FAMILIES. If its parameters have new names, lsjax/model/parameters.py has
them too.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lsjax.config import ConfigError, LlamaConfig, RopeScaling, check
from lsjax.config.checked import from_json

log = logging.getLogger(__name__)

FIELDS: Mapping[str, str] = {  # to fields of LlamaConfig
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_context",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types
BIASES = ("attention_bias", "mlp_bias")
# Those of transformers. Sizes have no default; num_key_value_heads and head_dim follow from others.
_DEFAULTS = dict.fromkeys(FIELDS) | dict(max_position_embeddings=2048, rms_norm_eps=1e-6)
_DEFAULTS |= dict(tie_word_embeddings=False, initializer_range=0.02, rope_theta=1e4)


class Family(NamedTuple):
    """An architecture of transformers."""

    model_type: str
    defaults: Mapping[str, Any]  # beside _DEFAULTS, and those of its own keys
    switches: Mapping[str, Any] = {}  # fields of LlamaConfig that no key sets
    # Whether a layer of a config without layer_types has the sliding window.
    slides: Callable[[int, Mapping[str, Any]], bool] = lambda layer, raw: True


def _no_rope_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Indices of the layers without rope, by a list of 0 (without) and 1, or by an interval."""
    count, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval")
    uses = raw.get("no_rope_layers")
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
    defaults=dict(max_position_embeddings=32_768, layer_types=None)
    | dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28),
    switches=dict(qkv_bias=True),
    slides=lambda layer, raw: layer >= raw["max_window_layers"],
)
_OLMO2 = Family(
    model_type="olmo2",
    defaults=dict(rms_norm_eps=1e-5, attention_bias=False),
    switches=dict(qk_norm="full", norm_after=True),
)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(model_type="llama", defaults=dict.fromkeys(BIASES, False)),
    "MistralForCausalLM": Family(
        "mistral", defaults=dict(max_position_embeddings=131_072, sliding_window=4096)
    ),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN2._replace(
        model_type="qwen3",
        defaults={**_QWEN2.defaults, "head_dim": 128, "attention_bias": False},
        switches=dict(qk_norm="head"),
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3",
        defaults=dict(max_position_embeddings=32_768, rope_theta=2e6, tie_word_embeddings=True)
        | dict(attention_bias=False, mlp_bias=False, layer_types=None)
        | dict(use_sliding_window=False, sliding_window=None)
        | dict(no_rope_layers=None, no_rope_layer_interval=4),
        slides=lambda layer, raw: layer in _no_rope_layers(raw),
    ),
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": _OLMO2._replace(
        model_type="olmo3",
        defaults={**_OLMO2.defaults, "rope_theta": 5e5, "window_rope_theta": 5e5}
        | dict(sliding_window=4096, layer_types=None),
        slides=lambda layer, raw: (layer + 1) % 4 != 0,
    ),
}
# Keys of rope scaling for each type; all are fields of RopeScaling.
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
ORIGINAL = "original_max_position_embeddings"
# Values besides null that change nothing; others change the computation and are rejected.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping"), ()),
    **dict.fromkeys(("layer_types", "quantization_config", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("scale_depth", "sliding_window"), ()),
    **dict.fromkeys(("alibi", "qk_norm", "rope_interleaved", "use_qk_norm", *BIASES), (False,)),
    **dict.fromkeys(("use_parallel_residual", "use_sliding_window"), (False,)),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "logit_scale"), (1.0,)),
    **dict.fromkeys(("logits_scaling", "partial_rotary_factor", "residual_multiplier"), (1.0,)),
    **dict.fromkeys(("rotary_pct", "scale_emb"), (1.0,)),
    **dict.fromkeys(("num_experts", "num_local_experts"), (0, 1)),
    **dict(hidden_act=("silu",), no_rope_layers=([],), pruned_heads=({},)),
}
# Keys that are read below, and those about loading, training, generation and labels.
HARMLESS = frozenset(
    f"""
    architectures model_type rope_parameters rope_scaling {ORIGINAL} max_window_layers
    _attn_implementation _name_or_path assistant_early_exit attention_dropout bos_token_id do_sample
    dtype eos_token_id id2label is_decoder is_encoder_decoder is_llama_config label2id max_length
    max_sequence_length no_rope_layer_interval num_assistant_tokens output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict temperature tokenizer_class top_k
    top_p torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)


def llama_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    """The LlamaConfig of a config.json; null counts as missing, except for head_dim and windows.

    Rope keys may be those of transformers 4 or 5. where: the file, for the warning about unknown
    keys. Raises ConfigError for an unsupported model, an invalid value or a missing size.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    family = _family(given)
    for key in given.keys() & NEUTRAL.keys() - family.defaults.keys():
        check(
            given[key] in NEUTRAL[key],
            f"{key} is {given[key]!r}, which changes the computation and is not supported: use a "
            f"checkpoint in which it is {' or '.join(map(repr, NEUTRAL[key])) or 'null'}",
        )
    known = _DEFAULTS.keys() | NEUTRAL.keys() | HARMLESS | family.defaults.keys()
    if unknown := sorted(given.keys() - known):
        log.warning("%s: unknown keys are ignored: %s", where, ", ".join(unknown))
    off = {key: None for key in ("head_dim", "sliding_window") if raw.get(key, 0) is None}
    raw = {**_DEFAULTS, **family.defaults, **given, **off}
    for key in family.defaults.keys() - FIELDS.keys():
        kind = type(family.defaults[key])
        check(
            kind not in (bool, int) or isinstance(raw[key], kind) or key in off,
            f"{key} is {raw[key]!r}, but must be of type {kind.__name__}",
        )
    fields = {name: raw[key] for key, name in FIELDS.items()}
    fields |= {key: raw.get(key, False) for key in BIASES}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        with suppress(TypeError, ZeroDivisionError):  # LlamaConfig reports the bad value
            fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    count = LlamaConfig(**fields).num_layers  # reports bad sizes, which the rest relies on
    check(count <= 10_000, f"num_hidden_layers is {count}, more than 10000: correct it")
    layers = _kinds_of_layers(raw, family)
    rope = _read_rope(raw, layers["sliding_window"] is not None)
    return LlamaConfig(**fields, **family.switches, **layers, **rope)


def _family(given: Mapping[str, Any]) -> Family:
    kind, named = given.get("model_type"), given.get("architectures")
    for name, family in FAMILIES.items():
        if named == [name] or (not named and kind == family.model_type):
            return family
    known = ", ".join(FAMILIES)
    raise ConfigError(f"architecture {named or kind!r} is not supported; only {known} are")


def _kinds_of_layers(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of LlamaConfig that differ by layer."""
    count, types = raw["num_hidden_layers"], raw.get("layer_types")
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if types is None:
        slides = [window is not None and family.slides(layer, raw) for layer in range(count)]
        types = [SLIDING if one else FULL for one in slides]
    allowed = (FULL,) if window is None else (FULL, SLIDING)
    check(
        isinstance(types, list) and len(types) == count and all(one in allowed for one in types),
        f"layer_types is {types!r}, but must have {' or '.join(allowed)} for each of {count} "
        f"layers, as sliding_window is {window!r}",
    )
    full = tuple(layer for layer, kind in enumerate(types) if kind == FULL)
    same = len(full) == count
    return {
        "sliding_window": None if same else window,
        "full_attention_layers": () if same else full,
        "no_rope_layers": _no_rope_layers(raw) if "no_rope_layers" in family.defaults else (),
    }


def _read_rope(raw: Mapping[str, Any], slides: bool) -> dict[str, Any]:
    """Theta and scaling, from rope_scaling (version 4), else from rope_parameters (version 5)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"rope_scaling is {rope!r}, but must be an object")
    window, own = rope.get(SLIDING) or {}, {}
    rope = rope.get(FULL, {} if window else rope)
    for one in (rope, window):
        check(isinstance(one, dict), f"rope_parameters has {one!r}, but must have objects")
    theta = raw["rope_theta"]
    if slides and (own_theta := window.get("rope_theta", raw.get("window_rope_theta"))):
        check(
            bool(window) or theta == own_theta,
            f"rope_theta is {theta!r}, and versions of transformers differ on layers with a "
            "sliding window: give rope_parameters for each type of layer",
        )
        check(
            window.get("rope_type", "default") == "default",
            f"rope_parameters scale layers with {SLIDING}, which is not supported",
        )
        own["window_rope_theta"] = own_theta
    partial = rope.get("partial_rotary_factor", 1.0)
    check(partial == 1.0, f"partial_rotary_factor {partial!r} is not supported")
    own["rope_theta"] = rope.get("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return own
    check(kind in [*SCALINGS], f"rope type {kind!r}; only {', '.join(SCALINGS)} are supported")
    values = {name: rope[name] for name in SCALINGS[kind] if rope.get(name) is not None}
    if kind != "linear":
        context = raw["max_position_embeddings"]
        values["original_context"] = raw.get(ORIGINAL, rope.get(ORIGINAL, context))
    scaling = from_json(RopeScaling, {"kind": kind, **values}, "rope")
    if kind == "yarn" and "attention_factor" not in values:
        # As YaRN recommends; two factors of its logarithm are DeepSeek's variant.
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        by = (above, below) if above and below else (1.0, 0.0)
        check(all(isinstance(one, int | float) for one in by), f"rope mscale is {by}")
        up, down = (1.0 + 0.1 * one * math.log(scaling.factor) for one in by)
        scaling = dataclasses.replace(scaling, attention_factor=up / down)
    return {**own, "rope_scaling": scaling}


def config_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """config.json for transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5.

    Its architecture is the first that reads it back as this config. Raises ConfigError if no
    architecture does.
    """
    scaling, rope = None, config.rope_scaling
    if rope is not None:
        scaling = {"rope_type": rope.kind}
        scaling |= {name: getattr(rope, name) for name in SCALINGS[rope.kind]}
        if rope.kind != "linear":
            scaling[ORIGINAL] = rope.original_context
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    if config.window_rope_theta is not None:
        own = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        parameters = {FULL: parameters, SLIDING: own}
    layers = range(config.num_layers)
    full, window = config.full_attention_layers, config.sliding_window
    values = {key: getattr(config, name) for key, name in FIELDS.items()} | {
        **{key: getattr(config, key) for key in BIASES},
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": len(full) if window else config.num_layers,
        "layer_types": [FULL if window is None or one in full else SLIDING for one in layers],
        "no_rope_layers": [int(layer not in config.no_rope_layers) for layer in layers],
    }
    for architecture, family in FAMILIES.items():
        keys = FIELDS.keys() | family.defaults.keys()
        raw = {
            "architectures": [architecture],
            "model_type": family.model_type,
            "hidden_act": "silu",
            **{key: value for key, value in values.items() if key in keys},
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "torch_dtype": str(dtype),
        }
        with suppress(ConfigError):
            read = llama_config(raw, architecture)
            if dataclasses.replace(read, scaled_init=config.scaled_init) == config:
                return raw
    raise ConfigError(
        f"no architecture of transformers has the switches of {config} together: keep the run, "
        "which lsjax reads"
    )
