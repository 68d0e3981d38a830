"""Configurations to JSON and back, and what is said of JSON that is none."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from lsjax.checkpoints import check_same_run, read_run_config
from lsjax.config import (
    ConfigError,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    RopeScaling,
    TrainConfig,
)
from lsjax.config.json_form import (
    VERSION,
    differences,
    from_json,
    to_json,
    versioned,
    without_version,
)

LLAMA3_2_1B = """{
  "version": 2,
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
    "original_context": 8192
  },
  "norm_eps": 1e-05,
  "tie_embeddings": true,
  "attention_bias": false,
  "mlp_bias": false,
  "init_std": 0.02,
  "scaled_init": false
}"""


@dataclass(frozen=True, kw_only=True)
class Files:
    pattern: str
    directory: Path = Path("data")


@dataclass(frozen=True, kw_only=True)
class Named:
    name: Literal["cnn", "code"] | None = None


@dataclass(frozen=True, kw_only=True)
class Everything:
    source: Files | Named
    sources: tuple[Files | Named, ...] = ()
    mesh: MeshConfig = MeshConfig()
    scaling: RopeScaling | None = None
    exits: Literal["all"] | tuple[int, ...] = "all"
    rate: float | None = None
    pair: tuple[int, str] = (0, "")
    nested: tuple[tuple[float, ...], ...] = ()
    on: bool = False
    many: int | tuple[int, ...] = 1


FULL = Everything(
    source=Files(pattern="*.txt", directory=Path("/data/text")),
    sources=(Named(name="code"), Files(pattern="a"), Named()),
    mesh=MeshConfig(data=-1),
    scaling=RopeScaling(kind="linear", factor=2.0),
    exits=(1, 4),
    rate=1e-3,
    pair=(3, "x"),
    nested=((0.5,), (), (1.0, 2.0)),
    on=True,
    many=(2, 3),
)


def test_golden_form():
    config = LlamaConfig.llama3_2_1b()
    assert json.dumps(versioned(config), indent=2) == LLAMA3_2_1B
    fields = without_version(json.loads(LLAMA3_2_1B), "config.json")
    assert from_json(LlamaConfig, fields) == config


@pytest.mark.parametrize("config", [FULL, Everything(source=Named()), LlamaConfig.tiny()])
def test_round_trip(config):
    text = json.dumps(to_json(config), allow_nan=False)
    again = from_json(type(config), json.loads(text))
    assert again == config and hash(again) == hash(config)
    assert json.dumps(to_json(again)) == text  # 1 and 1.0 are equal, but not the same


def test_whole_numbers_are_numbers_and_new_fields_get_their_defaults():
    read = from_json(Everything, {"source": {"type": "Named"}, "rate": 1})
    assert read == Everything(source=Named(), rate=1.0)
    assert isinstance(read.rate, float)


TINY = to_json(LlamaConfig.tiny())


@pytest.mark.parametrize(
    "kind, raw, message",
    [
        (
            LlamaConfig,
            {**TINY, "num_layer": 3},
            "num_layer is no key of LlamaConfig: did you mean num_layers?",
        ),
        (LlamaConfig, {**TINY, "num_layers": "4"}, 'num_layers is "4", but must be a whole number'),
        (LlamaConfig, {**TINY, "num_layers": 4.0}, "num_layers is 4.0, but must be a whole number"),
        (LlamaConfig, {**TINY, "num_layers": True}, "num_layers is true, but must be a whole"),
        (
            LlamaConfig,
            {**TINY, "norm_eps": False},
            "norm_eps is false, but must be a finite number",
        ),
        (LlamaConfig, {**TINY, "norm_eps": float("nan")}, "norm_eps is NaN, but must be a finite"),
        (LlamaConfig, {**TINY, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads"),
        (LlamaConfig, {**TINY, "tie_embeddings": 0}, "tie_embeddings is 0, but must be true or"),
        (LlamaConfig, {"vocab_size": 3}, "hidden_size is missing: LlamaConfig needs it"),
        (LlamaConfig, [1], "it is [1], but must be an object with the keys of LlamaConfig"),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "yarn", "factor": 2}},
            'rope_scaling.kind is "yarn", but must be one of "linear", "llama3"',
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "linear", "factr": 2}},
            "rope_scaling.factr is no key of RopeScaling: did you mean factor?",
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": {"kind": "linear", "factor": 0.5}},
            "rope_scaling: rope scaling factor 0.5 must be at least 1",
        ),
        (
            LlamaConfig,
            {**TINY, "rope_scaling": 3},
            "rope_scaling is 3, but must be an object with the keys of RopeScaling or null",
        ),
        (MeshConfig, {"xyz": 3}, "xyz is no key of MeshConfig: the keys are data, fsdp, tensor"),
        (Everything, {"source": {"pattern": "x"}}, "source.type is null, but must be one of Files"),
        (
            Everything,
            {"source": {"type": "Named"}, "sources": [{"type": "Named", "name": "law"}]},
            'sources[0].name is "law", but must be one of "cnn", "code" or null',
        ),
        (
            Everything,
            {"source": {"type": "Named"}, "exits": "some"},
            'exits is "some", but must be "all" or a list, each of it a whole number',
        ),
        (
            Everything,
            {"source": {"type": "Named"}, "exits": [1, "x"]},
            'exits[1] is "x", but must be a whole number',
        ),
        (
            Everything,
            {"source": {"type": "Named"}, "pair": [1]},
            "pair is [1], but must be a list of 2: a whole number, text",
        ),
        (
            Everything,
            {"source": {"type": "Named"}, "nested": [[1], [2, "3"]]},
            'nested[1][1] is "3", but must be a finite number',
        ),
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
        ({"version": VERSION + 1}, "was written by a newer lsjax"),
        ({"version": "1"}, 'version is "1", but must be a whole number'),
        ({"hidden_size": 3}, "version is null, but must be a whole number"),
        ([], "holds [], but must be a JSON object"),
    ],
)
def test_versions(raw, message):
    with pytest.raises(ConfigError) as error:
        without_version(raw, "config.json")
    assert str(error.value).startswith("config.json: ") and message in str(error.value)


@pytest.mark.parametrize(
    "written, skip", [({"per_batch": True}, "batch"), ({"per_batch": False}, "mask")]
)
def test_a_run_of_before_goes_on(tmp_path, written, skip):
    """Its config.json has the fields of then; the command is that of now."""
    dropout = {"p_max": 0.2, "distribution": "linear", **written}
    old = {"version": 1, "num_steps": 9, "seq_len": 64, "batch_size": 8, "init_from": ""}
    old |= {"model": TINY, "layer_dropout": dropout, "remat": "none"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    now = TrainConfig(
        num_steps=9,
        seq_len=64,
        batch_size=8,
        model=LlamaConfig.tiny(),
        layer_dropout=LayerDropoutConfig(p_max=0.2, distribution="linear", skip=skip),
    )
    assert read_run_config(tmp_path) == now
    assert check_same_run(read_run_config(tmp_path), now, "runs/a") == now
    other = dataclasses.replace(now.layer_dropout, skip="gather")
    with pytest.raises(ConfigError, match=f"layer_dropout.skip {skip}, now it is gather"):
        check_same_run(
            read_run_config(tmp_path), dataclasses.replace(now, layer_dropout=other), "runs/a"
        )


def test_the_fields_of_before_are_not_those_of_now():
    fields = {"layer_dropout": {"per_batch": True}}
    assert without_version({"version": VERSION, **fields}, "config.json") == fields


def test_what_json_does_not_have():
    with pytest.raises(ConfigError, match="Everything.rate is inf, which JSON does not have"):
        to_json(dataclasses.replace(FULL, rate=float("inf")))
    with pytest.raises(ConfigError, match="Everything.pair.0. is a set, which has no JSON form"):
        to_json(dataclasses.replace(FULL, pair=({1}, "")))


def test_differences():
    one = to_json(FULL)
    other = to_json(
        dataclasses.replace(FULL, mesh=MeshConfig(data=2), scaling=None, nested=((0.5,),))
    )
    assert differences(one, one) == []
    assert differences(one, other) == [
        ("mesh.data", -1, 2),
        ("scaling", one["scaling"], None),
        ("nested", [[0.5], [], [1.0, 2.0]], [[0.5]]),
    ]
