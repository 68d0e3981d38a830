"""Configurations: frozen, hashable dataclasses that check their values."""

from lsjax.config.checked import Checked as Checked
from lsjax.config.checked import ConfigError as ConfigError
from lsjax.config.checked import bounded as bounded
from lsjax.config.checked import check as check
from lsjax.config.llama import LlamaConfig as LlamaConfig
from lsjax.config.llama import RopeScaling as RopeScaling
from lsjax.config.paths import AnyPath as AnyPath
from lsjax.config.paths import as_path as as_path
from lsjax.config.paths import in_bucket as in_bucket
from lsjax.config.paths import split_step as split_step
from lsjax.config.step import AttentionKernel as AttentionKernel
from lsjax.config.step import ComputeDtype as ComputeDtype
from lsjax.config.step import EarlyExitConfig as EarlyExitConfig
from lsjax.config.step import Kernels as Kernels
from lsjax.config.step import LayerDropoutConfig as LayerDropoutConfig
from lsjax.config.step import LoraConfig as LoraConfig
from lsjax.config.step import LoraTarget as LoraTarget
from lsjax.config.step import MeshConfig as MeshConfig
from lsjax.config.step import OptimizerConfig as OptimizerConfig
from lsjax.config.step import StepConfig as StepConfig
from lsjax.config.train import CheckpointConfig as CheckpointConfig
from lsjax.config.train import DataConfig as DataConfig
from lsjax.config.train import EvaluationConfig as EvaluationConfig
from lsjax.config.train import ProfileConfig as ProfileConfig
from lsjax.config.train import TrainConfig as TrainConfig
