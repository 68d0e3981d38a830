"""Configurations: frozen, hashable dataclasses that check their values."""

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

__all__ = [
    "AttentionKernel",
    "CheckpointConfig",
    "Checked",
    "ComputeDtype",
    "ConfigError",
    "DataConfig",
    "EarlyExitConfig",
    "EvaluationConfig",
    "LayerDropoutConfig",
    "LlamaConfig",
    "LoraConfig",
    "LoraTarget",
    "MeshConfig",
    "OptimizerConfig",
    "RopeScaling",
    "StepConfig",
    "TrainConfig",
    "bounded",
    "check",
    "split_step",
]
