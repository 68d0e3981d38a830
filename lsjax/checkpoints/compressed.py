"""int8 checkpoints in the format of compressed-tensors, with a scale for each output channel.

A matrix is an int8 tensor, and "..._scale" [outputs, 1] beside it. config.json says so under
quantization_config. Activations that the checkpoint asks to round stay as they are here, which is
more exact.
"""

from collections.abc import Mapping
from typing import Any

from lsjax.config import check

KEY = "quantization_config"
CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def quantization_config(ignored: list[str]) -> dict[str, Any]:
    """What config.json says about int8 matrices. ignored: modules that are not rounded."""
    weights = {**CHANNELS, "dynamic": False, "group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


def without_quantization(raw: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A config.json without these settings, and whether it has them. Other kinds of quantisation
    stay in it, for `llama_config` to refuse. Raises ConfigError for another granularity."""
    found = raw.get(KEY)
    if not isinstance(found, dict) or found.get("format") != "int-quantized":
        return dict(raw), False
    for name, group in (found.get("config_groups") or {}).items():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        wrong = {key: weights.get(key) for key in CHANNELS if weights.get(key) != CHANNELS[key]}
        check(
            not wrong,
            f"{KEY} of {name} has weights with {wrong}: only int8 with a symmetric scale for each "
            "output channel is supported",
        )
    return {key: value for key, value in raw.items() if key != KEY}, True
