"""Configurations: frozen, hashable dataclasses that say what is wrong with a bad value."""

from lsjax.config.checked import Checked, ConfigError, bounded, check
from lsjax.config.data import DataConfig
from lsjax.config.llama import LlamaConfig, RopeScaling
from lsjax.config.step import (
    AttentionKernel,
    ComputeDtype,
    EarlyExitConfig,
    LayerDropoutConfig,
    LoraConfig,
    LoraTarget,
    OptimizerConfig,
    StepConfig,
)
from lsjax.config.train import (
    CheckpointConfig,
    EvaluationConfig,
    MeshConfig,
    TrainConfig,
    split_step,
)
