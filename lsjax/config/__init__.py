"""Configurations: frozen, hashable dataclasses that say what is wrong with a bad value."""

from lsjax.config.data import DataConfig
from lsjax.config.early_exit import EarlyExitConfig
from lsjax.config.errors import ConfigError, check
from lsjax.config.layer_dropout import LayerDropoutConfig
from lsjax.config.llama import LlamaConfig, RopeScaling
from lsjax.config.lora import LoraConfig
from lsjax.config.mesh import MeshConfig
from lsjax.config.optimizer import OptimizerConfig
from lsjax.config.step import AttentionKernel, ComputeDtype, StepConfig
from lsjax.config.train import CheckpointConfig, EvaluationConfig, TrainConfig

__all__ = [
    "AttentionKernel",
    "CheckpointConfig",
    "ComputeDtype",
    "EvaluationConfig",
    "TrainConfig",
    "ConfigError",
    "DataConfig",
    "EarlyExitConfig",
    "LayerDropoutConfig",
    "LlamaConfig",
    "LoraConfig",
    "MeshConfig",
    "OptimizerConfig",
    "RopeScaling",
    "StepConfig",
    "check",
]
