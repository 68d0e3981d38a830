"""LayerSkip in JAX: early-exit training and lossless self-speculative decoding of Llamas.

>>> import lsjax
>>> model = lsjax.load("path/to/model")
>>> engine = lsjax.Engine(model, lsjax.load_tokenizer("path/to/model"))
>>> print(engine.generate(["Once upon a time"], max_new_tokens=32)[0].text)
"""

from collections.abc import Callable, Sequence
from typing import Any

from lsjax.checkpoints import load
from lsjax.checkpoints.huggingface import GenerationDefaults, read_generation_defaults, save
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import (
    ConfigError,
    LlamaConfig,
    MeshConfig,
    Path,
    RopeScaling,
    TrainConfig,
    as_path,
)
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.batching import Conversation
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.sharding import make_mesh
from lsjax.training.early_exit import exit_weights
from lsjax.training.layer_dropout import drop_rates
from lsjax.training.step import TrainState, init_state, make_train_step

__all__ = [
    "Autoregressive",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Conversation",
    "EarlyExit",
    "Engine",
    "GenerationDefaults",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "MeshConfig",
    "Request",
    "RopeScaling",
    "Sampling",
    "SelfSpeculative",
    "TrainConfig",
    "drop_rates",
    "exit_weights",
    "init_state",
    "load",
    "load_tokenizer",
    "make_mesh",
    "make_train_step",
    "read_generation_defaults",
    "save",
    "stacked",
    "train",
    "unstacked",
]


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    hooks: Sequence[Callable] | None = None,
    **options: Any,
) -> TrainState:
    """Trains or resumes the run in `workdir`; returns the state after the last step.

    The directory holds the saved steps and metrics.jsonl; `load` reads it as a model.

    Args:
      hooks: functions that make hooks of the loop. The default scores every exit on held-out rows.
        These scores select the best saved steps.
      options: keywords of `train_run` (lsjax/training/run.py) and of `make_train_step`.

    Raises ConfigError or CheckpointError for bad input.
    """
    # Imported here: they import grain and orbax, which decoding does not need.
    from lsjax.evaluation.exits import evaluation_hook
    from lsjax.training.prepare import prepare_run
    from lsjax.training.run import train_run

    hooks = [evaluation_hook] if hooks is None else hooks
    return train_run(prepare_run(config, as_path(workdir)), hooks=hooks, **options)
