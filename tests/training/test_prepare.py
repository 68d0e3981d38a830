"""What of a configuration may change when a run resumes, and what is said of the rest."""

import dataclasses

import pytest

from lsjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lsjax.training.prepare import check_same_run

CONFIG = TrainConfig(
    data=DataConfig(source="text", paths=("a",), tokenizer="t"),
    num_steps=100,
    batch_size=8,
    seq_len=64,
    model=LlamaConfig.tiny(),
    layer_dropout=LayerDropoutConfig(p_max=0.2, layers=(1, 3)),
    optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=None),
)


def changed(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(model=None, init_from="x"),
        dict(model=LlamaConfig.tiny(max_context=64, init_std=1.0)),
        dict(mesh=MeshConfig(data=2)),
        dict(micro_batches=4, remat="nothing_saveable", kernels="reference"),
        dict(checkpoints=CheckpointConfig(every=7), max_skipped=3),
        dict(data=DataConfig(source="text", paths=("b",), validation_paths=("c",), tokenizer="d")),
    ],
)
def test_what_may_change(changes):
    now = check_same_run(CONFIG, changed(**changes), "runs/a")
    assert now == changed(**changes | {"model": CONFIG.model})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(num_steps=101),
            "num_steps 100, now it is 101: a run can't change it; use another --workdir or the old "
            "value, or train it further in a new run with --init-from runs/a",
        ),
        (dict(seed=1), "seed 0, now it is 1"),
        (dict(batch_size=16), "batch_size 8, now it is 16"),
        (dict(model=LlamaConfig.tiny(num_layers=5)), "model.num_layers 4, now it is 5"),
        (dict(layer_dropout=LayerDropoutConfig(p_max=0.2)), "layer_dropout.layers (1, 3), now "),
        (
            dict(data=dataclasses.replace(CONFIG.data, separator="blank_line")),
            "data.separator file, now it is blank_line",
        ),
        (dict(optimizer=OptimizerConfig(clip_norm=None)), "optimizer.learning_rate 0.001, now "),
    ],
)
def test_what_may_not(changes, message):
    with pytest.raises(ConfigError) as error:
        check_same_run(CONFIG, changed(**changes), "runs/a")
    assert str(error.value).startswith(f"runs/a was started with {message}")
