"""A whole run's configuration: its file, what must fit, and what may change on the way."""

import dataclasses
import json

import pytest

from lsjax.config import (
    CheckpointConfig,
    ConfigError,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lsjax.config.json_form import from_json, versioned, without_version
from lsjax.config.resume import check_resume

CONFIG = TrainConfig(
    num_steps=100,
    batch_size=8,
    seq_len=64,
    model=LlamaConfig.tiny(),
    layer_dropout=LayerDropoutConfig(p_max=0.2, layers=(1, 3)),
    optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=None),
)


def changed(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("config", [CONFIG, changed(model=None, init_from="models/smollm2")])
def test_file_and_back(config):
    text = json.dumps(versioned(config), allow_nan=False)
    again = from_json(TrainConfig, without_version(json.loads(text), "config.json"))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seq_len=513), "seq_len 513 is longer than the model's context of 512"),
        (dict(batch_size=6, micro_batches=4), "micro_batches 4 does not divide the batch of 6"),
        (dict(model=None), "there is no model: give its shape in model, or a checkpoint"),
        (dict(layer_dropout=LayerDropoutConfig(layers=(4,))), "has 4, but the layers are 0..3"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(**changes)


def test_rows_are_shared_out_evenly():
    config = changed(mesh=MeshConfig(data=-1, tensor=2), micro_batches=2)
    config.check_devices(8)
    with pytest.raises(
        ConfigError, match="batch_size 8 does not divide into 2 micro-batches over "
    ):
        config.check_devices(16)
    with pytest.raises(ConfigError, match="does not fit 7 devices"):
        config.check_devices(7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(model=None, init_from="x"),
        dict(mesh=MeshConfig(data=2)),
        dict(micro_batches=4, remat="nothing_saveable"),
        dict(checkpoints=CheckpointConfig(every=7), tensorboard=True),
    ],
)
def test_what_may_change(changes):
    before = changed(init_from=changes.get("init_from", ""))
    check_resume(before, changed(**changes), "runs/a")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_steps=101), "num_steps 100, not 101"),
        (dict(seed=1), "seed 0, not 1"),
        (dict(batch_size=16), "batch_size 8, not 16"),
        (dict(model=LlamaConfig.tiny(num_layers=5)), "model.num_layers 4, not 5"),
        (dict(init_from="x"), 'init_from "", not "x"'),
        (
            dict(layer_dropout=LayerDropoutConfig(p_max=0.2)),
            "layer_dropout.layers [1, 3], not null",
        ),
        (
            dict(seed=2, optimizer=OptimizerConfig(clip_norm=None)),
            "seed 0, not 2 (and other values of optimizer.learning_rate): go on with the old",
        ),
    ],
)
def test_what_may_not(changes, message):
    with pytest.raises(ConfigError) as error:
        check_resume(CONFIG, changed(**changes), "runs/a")
    assert str(error.value).startswith(f"runs/a was begun with {message}")
