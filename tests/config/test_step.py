"""What is said of training configurations that cannot work: one line, with value and limit."""

import pytest

from lsjax.config import (
    ConfigError,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    LoraConfig,
    OptimizerConfig,
    StepConfig,
)


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (
            LayerDropoutConfig,
            dict(p_max=1.5),
            "p_max 1.5 must be a finite number from 0 to 1",
        ),
        (
            LayerDropoutConfig,
            dict(distribution="sine"),
            "distribution 'sine' must be one of exponential",
        ),
        (LayerDropoutConfig, dict(schedule="step"), "schedule 'step' must be one of constant"),
        (LayerDropoutConfig, dict(gamma=0.0), "gamma 0.0 must be a finite number above 0"),
        (EarlyExitConfig, dict(curriculum="random"), "curriculum 'random' must be one of none"),
        (EarlyExitConfig, dict(weights="linear"), "weights 'linear' must be one of paper"),
        (EarlyExitConfig, dict(target="teacher"), "target 'teacher' must be one of labels"),
        (
            EarlyExitConfig,
            dict(rotation=0),
            "early_exit.rotation 0 must be a whole number of at least 1",
        ),
        (EarlyExitConfig, dict(exits=(3,)), "belongs to the subset curriculum"),
        (EarlyExitConfig, dict(curriculum="subset"), "belongs to the subset curriculum"),
        (
            EarlyExitConfig,
            dict(e_scale=2.0),
            "e_scale 2.0 must be a finite number from 0 to 1",
        ),
        (EarlyExitConfig, dict(weights="custom"), "belongs to weights custom"),
        (EarlyExitConfig, dict(weights="custom", custom_weights=(1.0, 0.0)), "must end above 0"),
        (
            EarlyExitConfig,
            dict(token_share=0.0),
            "token_share 0.0 must be a finite number above 0 and at most 1",
        ),
        (OptimizerConfig, dict(schedule="step"), "schedule 'step' must be one of constant"),
        (
            OptimizerConfig,
            dict(learning_rate=-1.0),
            "learning_rate -1.0 must be a finite number of at least 0",
        ),
        (
            OptimizerConfig,
            dict(warmup_steps=-1),
            "warmup_steps -1 must be a whole number of at least 0",
        ),
        (
            OptimizerConfig,
            dict(final_share=2.0),
            "final_share 2.0 must be a finite number from 0 to 1",
        ),
        (OptimizerConfig, dict(b2=1.0), "b2 1.0 must be a finite number of at least 0 and below 1"),
        (OptimizerConfig, dict(eps=0.0), "eps 0.0 must be a finite number above 0"),
        (
            OptimizerConfig,
            dict(weight_decay=-0.1),
            "weight_decay -0.1 must be a finite number of at least 0",
        ),
        (
            OptimizerConfig,
            dict(clip_norm=0.0),
            "clip_norm 0.0 must be a finite number above 0 or None",
        ),
        (EarlyExitConfig, dict(weights="custom", custom_weights=(-1.0, 1.0)), "each item a finite"),
        (EarlyExitConfig, dict(exits=3), "exits 3 must be a tuple, each item a whole number"),
        (OptimizerConfig, dict(learning_rate=float("nan")), "rate nan must be a finite number"),
        (OptimizerConfig, dict(warmup_steps=5e4), "warmup_steps 50000.0 must be a whole number"),
        (LoraConfig, dict(rank=-1), "lora.rank -1 must be .* 0: 0 trains the full model"),
        (LoraConfig, dict(targets=("head",)), "lora.targets .'head',. must be .* one of qkv"),
        (LoraConfig, dict(targets=("out", "out")), "must name at least one matrix, and each once"),
        (StepConfig, dict(num_steps=True), "num_steps True must be a whole number of at least 1"),
        (StepConfig, dict(num_steps=0), "num_steps 0 must be a whole number of at least 1"),
        (StepConfig, dict(num_steps=9, seed=-1), "seed -1 must be a whole number of at least 0"),
        (
            StepConfig,
            dict(num_steps=9, z_loss=-1.0),
            "z_loss -1.0 must be a finite number of at least 0",
        ),
        (
            StepConfig,
            dict(num_steps=9, micro_batches=0),
            "micro_batches 0 must be a whole number of at least 1",
        ),
        (StepConfig, dict(num_steps=9, remat="most"), "remat 'most' must be one of auto"),
        (StepConfig, dict(num_steps=9, dtype="float16"), "dtype 'float16' must be one of auto"),
        (
            StepConfig,
            dict(num_steps=9, attention="flash", kernels="reference"),
            'attention "flash" needs kernels "auto": drop one of the two',
        ),
        (StepConfig, dict(num_steps=9, kernels="none"), "kernels 'none' must be one of auto"),
    ],
)
def test_values_that_cannot_be(config, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_dropout=LayerDropoutConfig(layers=(4,))), "has 4, but the layers are 0..3"),
        (
            dict(early_exit=EarlyExitConfig(curriculum="subset", exits=(5,))),
            "has 5, but the exits are 1..4",
        ),
        (
            dict(early_exit=EarlyExitConfig(weights="custom", custom_weights=(1.0,))),
            "has 1 weights, but there are 4 exits",
        ),
    ],
)
def test_layers_that_the_model_does_not_have(changes, message):
    with pytest.raises(ConfigError, match=message):
        StepConfig(num_steps=9, **changes).check_model(LlamaConfig.tiny())


def test_micro_batches_that_do_not_divide():
    with pytest.raises(ConfigError, match="micro_batches 3 does not divide the batch of 4 rows"):
        StepConfig(num_steps=9, micro_batches=3).check_batch(4)


def test_configs_are_hashable():
    assert len({StepConfig(num_steps=9), StepConfig(num_steps=9)}) == 1
