"""A whole run's configuration: its file and what must fit."""

import dataclasses
import json

import pytest

from lsjax.config import (
    ConfigError,
    LayerDropoutConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
)
from lsjax.config.checked import from_json, versioned, without_version

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
    again = from_json(TrainConfig, without_version(json.loads(text), "config.json"), "config.json")
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
