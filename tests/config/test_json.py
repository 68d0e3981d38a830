"""Configurations to JSON and back, and what is said of JSON that is none."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from typing import Literal

import pytest

from lsjax.config import (
    Checked,
    ConfigError,
    LlamaConfig,
    MeshConfig,
    RopeScaling,
    bounded,
)
from lsjax.config.checked import (
    VERSION,
    differences,
    from_json,
    versioned,
    without_version,
)

LLAMA3_2_1B = """{
  "version": 3,
  "vocab_size": 128256,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_layers": 16,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 64,
  "max_context": 131072,
  "rope_theta": 500000.0,
  "rope_scaling": {
    "kind": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
    "truncate": true
  },
  "norm_eps": 1e-05,
  "tie_embeddings": true,
  "attention_bias": false,
  "qkv_bias": false,
  "mlp_bias": false,
  "qk_norm": "none",
  "norm_after": false,
  "no_rope_layers": [],
  "sliding_window": null,
  "full_attention_layers": [],
  "window_rope_theta": null,
  "init_std": 0.02,
  "scaled_init": false
}"""


@dataclass(frozen=True, kw_only=True)
class Everything(Checked):
    name: Literal["cnn", "code"] | None = None
    mesh: MeshConfig = MeshConfig()
    scaling: RopeScaling | None = None
    exits: Literal["all"] | tuple[int, ...] = "all"
    rate: float | None = None
    nested: tuple[tuple[float, ...], ...] = ()
    on: bool = False
    many: int | tuple[int, ...] = 1
    sized: float = bounded(1.0, above=0, high=9)


FULL = Everything(
    name="code",
    mesh=MeshConfig(data=-1),
    scaling=RopeScaling(kind="linear", factor=2.0),
    exits=(1, 4),
    rate=1e-3,
    nested=((0.5,), (), (1.0, 2.0)),
    on=True,
    many=(2, 3),
)


def test_golden_form():
    config = LlamaConfig.llama3_2_1b()
    assert json.dumps(versioned(config), indent=2) == LLAMA3_2_1B
    fields = without_version(json.loads(LLAMA3_2_1B), "config.json")
    assert from_json(LlamaConfig, fields, "config.json") == config


@pytest.mark.parametrize("config", [FULL, Everything(), LlamaConfig.tiny()])
def test_round_trip(config):
    text = json.dumps(asdict(config), allow_nan=False)
    again = from_json(type(config), json.loads(text), "config.json")
    assert again == config and hash(again) == hash(config)
    assert json.dumps(asdict(again)) == text  # 1 and 1.0 are equal, but not the same


def test_whole_numbers_are_numbers_and_new_fields_get_their_defaults():
    read = from_json(Everything, {"rate": 1}, "config.json")
    assert read == Everything(rate=1.0)
    assert isinstance(read.rate, float)


TINY = asdict(LlamaConfig.tiny())


@pytest.mark.parametrize(
    "kind, raw, message",
    [
        (
            LlamaConfig,
            {**TINY, "num_layer": 3},
            "num_layer is not a key of LlamaConfig: did you mean num_layers?",
        ),
        (
            LlamaConfig,
            {**TINY, "num_layers": "4"},
            "num_layers '4' must be a whole number of at least 1",
        ),
        (
            LlamaConfig,
            {**TINY, "num_layers": 4.0},
            "num_layers 4.0 must be a whole number of at least 1",
        ),
        (LlamaConfig, {**TINY, "num_layers": True}, "num_layers True must be a whole number"),
        (
            LlamaConfig,
            {**TINY, "norm_eps": False},
            "norm_eps False must be a finite number",
        ),
        (LlamaConfig, {**TINY, "norm_eps": float("nan")}, "norm_eps nan must be a finite number"),
        (LlamaConfig, {**TINY, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads"),
        (LlamaConfig, {**TINY, "tie_embeddings": 0}, "tie_embeddings 0 must be True or False"),
        (LlamaConfig, {"vocab_size": 3}, "hidden_size is missing: LlamaConfig needs it"),
        (LlamaConfig, [1], "[1] must be an object, as a LlamaConfig is"),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "longrope", "factor": 2}},
            "rope_scaling.kind 'longrope' must be one of linear, llama3, yarn",
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "linear", "factr": 2}},
            "rope_scaling.factr is not a key of RopeScaling: did you mean factor?",
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "linear", "factor": 0.5}},
            "rope_scaling.factor 0.5 must be a finite number of at least 1",
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": 3},
            "rope_scaling 3 must be a RopeScaling or None",
        ),
        (
            MeshConfig,
            {"xyz": 3},
            "mesh.xyz is not a key of MeshConfig: the keys are data, fsdp, context, tensor",
        ),
        (Everything, {"name": "law"}, "name 'law' must be one of cnn, code or None"),
        (Everything, {"exits": "some"}, "exits 'some' must be all or a tuple, each item a whole"),
        (Everything, {"exits": [1, "x"]}, "exits [1, 'x'] must be all or a tuple, each item a"),
        (Everything, {"nested": [[1], [2, "3"]]}, "nested [[1], [2, '3']] must be a tuple"),
        (Everything, {"rate": float("inf")}, "rate inf must be a finite number or None"),
        (Everything, {"mesh": {"data": 1.5}}, "mesh.data 1.5 must be a whole number"),
        (Everything, {"sized": 0}, "sized 0 must be a finite number above 0 and at most 9"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind, raw, message):
    with pytest.raises(ConfigError) as error:
        from_json(kind, raw, "run/config.json")
    assert str(error.value).startswith(f"run/config.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"version": VERSION + 1}, f"version is {VERSION + 1}, but this lsjax reads {VERSION}"),
        ({"version": 1, "num_steps": 9}, "convert the run with the lsjax that wrote it"),
        ({"version": str(VERSION)}, f"version is '{VERSION}', but this lsjax reads {VERSION}"),
        ({"version": True}, "version is True, but this lsjax reads"),
        ({"hidden_size": 3}, "version is None, but this lsjax reads"),
        ([], "holds [], but must be a JSON object"),
    ],
)
def test_versions(raw, message):
    with pytest.raises(ConfigError) as error:
        without_version(raw, "config.json")
    assert str(error.value).startswith("config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_differences():
    one = asdict(FULL)
    other = asdict(
        dataclasses.replace(FULL, mesh=MeshConfig(data=2), scaling=None, nested=((0.5,),))
    )
    assert differences(one, one) == []
    assert differences(one, other) == [
        ("mesh.data", -1, 2),
        ("scaling", one["scaling"], None),
        ("nested", ((0.5,), (), (1.0, 2.0)), ((0.5,),)),
    ]
