"""Configurations: frozen, hashable dataclasses that check their values."""

from lsjax.config.adapters import (
    BlockStart as BlockStart,
    ExitBlocksConfig as ExitBlocksConfig,
    LoraConfig as LoraConfig,
    LoraTarget as LoraTarget,
)
from lsjax.config.checked import (
    Checked as Checked,
    ConfigError as ConfigError,
    bounded as bounded,
    check as check,
)
from lsjax.config.decoding import (
    GREEDY as GREEDY,
    DecodingShape as DecodingShape,
    Sampling as Sampling,
    Weights as Weights,
)
from lsjax.config.hosts import Hosts as Hosts
from lsjax.config.llama import LlamaConfig as LlamaConfig, RopeScaling as RopeScaling
from lsjax.config.paths import (
    AnyPath as AnyPath,
    as_path as as_path,
    in_bucket as in_bucket,
    split_step as split_step,
)
from lsjax.config.step import (
    AttentionKernel as AttentionKernel,
    ComputeDtype as ComputeDtype,
    EarlyExitConfig as EarlyExitConfig,
    Kernels as Kernels,
    LayerDropoutConfig as LayerDropoutConfig,
    MeshConfig as MeshConfig,
    OptimizerConfig as OptimizerConfig,
    StepConfig as StepConfig,
)
from lsjax.config.train import (
    CheckpointConfig as CheckpointConfig,
    DataConfig as DataConfig,
    EvaluationConfig as EvaluationConfig,
    ProfileConfig as ProfileConfig,
    TrainConfig as TrainConfig,
)
