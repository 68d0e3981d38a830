"""Converts config.json to a LlamaConfig and back; GGUF metadata is read under the same keys.

families.py has the tables of keys.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lsjax.checkpoints.families import (
    BIASES,
    FAMILIES,
    FIELDS,
    FULL,
    HARMLESS,
    MISSING,
    NEUTRAL,
    OPTIONAL,
    ORIGINAL,
    SCALINGS,
    SLIDING,
    Family,
    no_rope_layers,
)
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import ConfigError, LlamaConfig, Path, RopeScaling, check
from lsjax.data.files import read_json

log = logging.getLogger(__name__)


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
    """The LlamaConfig of a config.json. Keys that are null count as missing, except OPTIONAL ones.

    where: the file, for the warning about unknown keys. Raises ConfigError.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    family = _family(given)
    for key in given.keys() & NEUTRAL.keys() - family.defaults.keys():
        check(
            given[key] in NEUTRAL[key],
            f"{key} is {given[key]!r}, which changes the computation and is not supported: use a "
            f"checkpoint in which it is {' or '.join(map(repr, NEUTRAL[key])) or 'null'}",
        )
    known = FIELDS.keys() | NEUTRAL.keys() | HARMLESS | family.defaults.keys()
    if unknown := sorted(given.keys() - known):
        log.warning("%s: unknown keys are ignored: %s", where, ", ".join(unknown))
    off = {key: None for key in OPTIONAL if raw.get(key, 0) is None}
    defaults = {key: default for key, (_, default) in FIELDS.items()}
    raw = {"rope_theta": 1e4, **defaults, **family.defaults, **given, **off}
    for key in family.defaults.keys() - FIELDS.keys():
        kind = type(family.defaults[key])
        check(
            kind not in (bool, int) or isinstance(raw[key], kind) or key in off,
            f"{key} is {raw[key]!r}, but must be of type {kind.__name__}",
        )
    fields = {field: raw[key] for key, (field, _) in FIELDS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        with suppress(TypeError, ZeroDivisionError):  # LlamaConfig reports the bad value
            fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    fields |= {key: raw.get(key, False) for key in BIASES}
    count = LlamaConfig(**fields).num_layers  # reports bad sizes, which the rest relies on
    check(count <= 10_000, f"num_hidden_layers is {count}, more than 10000: correct it")
    layers = _kinds_of_layers(raw, family)
    slides = layers["sliding_window"] is not None
    return LlamaConfig(**fields, **family.switches, **layers, **_read_rope(raw, slides))


def _family(given: Mapping[str, Any]) -> Family:
    """The family that a config names."""
    kind = given.get("model_type")
    named = [name for name, family in FAMILIES.items() if family.model_type == kind]
    architectures = given.get("architectures") or named or kind
    match architectures:
        case [str(name)] if name in FAMILIES:
            return FAMILIES[name]
    needs = (
        f", which needs {need}" for names, need in MISSING.items() if re.match(names, f"{kind}")
    )
    why = next(needs, "")
    raise ConfigError(
        f"architecture {architectures!r}{why}; only {', '.join(FAMILIES)} are supported"
    )


def _kinds_of_layers(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of LlamaConfig that differ by layer."""
    count, types = raw["num_hidden_layers"], raw.get("layer_types")
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if types is None:
        slides = [window is not None and family.slides(layer, raw) for layer in range(count)]
        types = [SLIDING if one else FULL for one in slides]
    check(
        isinstance(types, list)
        and len(types) == count
        and all(one in (FULL, SLIDING) for one in types),
        f"layer_types is {types!r}, but must have {FULL} or {SLIDING} for each of {count} layers",
    )
    check(
        window is not None or SLIDING not in types,
        f"layer_types has {SLIDING}, but sliding_window is off: set one of them right",
    )
    full = tuple(layer for layer, kind in enumerate(types) if kind == FULL)
    if len(full) == count:
        window, full = None, ()
    return {
        "sliding_window": window,
        "full_attention_layers": full,
        "no_rope_layers": no_rope_layers(raw) if "no_rope_layers" in family.defaults else (),
    }


def _read_rope(raw: Mapping[str, Any], slides: bool) -> dict[str, Any]:
    """Theta and scaling, from rope_scaling (version 4), else from rope_parameters (version 5).

    slides: whether a layer has the sliding window.
    """
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
    check(kind in SCALINGS, f"rope type {kind!r}; only {', '.join(SCALINGS)} are supported")
    needed, optional = SCALINGS[kind]
    for name in needed:
        check(rope.get(name) is not None, f"rope {name} is missing, but type {kind!r} needs it")
    values = {name: rope[name] for name in (*needed, *optional) if rope.get(name) is not None}
    if kind != "linear":
        context = raw["max_position_embeddings"]
        values["original_context"] = raw.get(ORIGINAL, rope.get(ORIGINAL, context))
    scaling = RopeScaling(kind=kind, **values)
    if kind == "yarn" and "attention_factor" not in values:
        # As YaRN recommends; two factors of its logarithm are DeepSeek's variant.
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        by = (above, below) if above and below else (1.0, 0.0)
        check(all(isinstance(one, int | float) for one in by), f"rope mscale is {by}")
        up, down = (1.0 + 0.1 * one * math.log(scaling.factor) for one in by)
        scaling = dataclasses.replace(scaling, attention_factor=up / down)
    return {**own, "rope_scaling": scaling}


def to_config_json(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """config.json for transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5.

    Its architecture is the first that reads it back as this config. Raises CheckpointError if
    there is none.
    """
    scaling, rope = None, config.rope_scaling
    if rope is not None:
        scaling = {"rope_type": rope.kind}
        if rope.kind != "linear":
            scaling[ORIGINAL] = rope.original_context
        names = (name for names in SCALINGS[rope.kind] for name in names)
        scaling |= {name: getattr(rope, name) for name in names}
    theta = {"rope_theta": config.rope_theta}
    parameters = (scaling or {"rope_type": "default"}) | theta
    if config.window_rope_theta is not None:
        window = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        parameters = {FULL: parameters, SLIDING: window}
    layers = range(config.num_layers)
    full, window = config.full_attention_layers, config.sliding_window
    values = {key: getattr(config, field) for key, (field, _) in FIELDS.items()} | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
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
            **theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "torch_dtype": str(dtype),
        }
        with suppress(ConfigError):
            read = llama_config(raw, architecture)
            if dataclasses.replace(read, scaled_init=config.scaled_init) == config:
                return raw
    raise CheckpointError(
        f"no architecture of transformers has the switches of {config} together: keep the run, "
        "which lsjax reads"
    )
