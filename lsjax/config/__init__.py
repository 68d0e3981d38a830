"""Configurations: frozen, hashable dataclasses that check their values."""

from lsjax.config.checked import Checked, ConfigError, bounded, check
from lsjax.config.data import DataConfig
from lsjax.config.llama import LlamaConfig, RopeScaling
from lsjax.config.paths import Path, as_path, in_bucket, split_step
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
    ProfileConfig,
    TrainConfig,
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
    "Path",
    "ProfileConfig",
    "RopeScaling",
    "StepConfig",
    "TrainConfig",
    "as_path",
    "bounded",
    "check",
    "in_bucket",
    "split_step",
]
