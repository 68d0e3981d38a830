"""LayerSkip in JAX: early-exit training and lossless self-speculative decoding of Llamas.

>>> import lsjax
>>> model = lsjax.load("path/to/model")
>>> engine = lsjax.Engine(model, lsjax.load_tokenizer("path/to/model"))
>>> print(engine.generate(["Once upon a time"], max_new_tokens=32)[0].text)
"""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsjax.config import AnyPath, TrainConfig
    from lsjax.training.step import TrainState

IMPORTED = time.time()  # about when the program began: other imports take seconds
# Public names by module. They are imported when they are used, because JAX is slow to import and
# processes that only tokenize do not need it.
_PUBLIC = {
    "checkpoints": ("load",),
    "checkpoints.huggingface": ("GenerationDefaults", "read_generation_defaults", "save"),
    "checkpoints.tensors": ("CheckpointError",),
    "config": ("ConfigError", "LlamaConfig", "MeshConfig", "RopeScaling", "TrainConfig"),
    "data.tokenizer_files": ("load_tokenizer",),
    "decoding.auto.adaptive": ("Adaptive",),
    "decoding.batching": ("Conversation",),
    "decoding.completion": ("Completion",),
    "decoding.engine": ("Engine",),
    "decoding.request": ("Request",),
    "decoding.sampling": ("Sampling",),
    "decoding.self_speculative": ("SelfSpeculative",),
    "decoding.strategy": ("Autoregressive", "EarlyExit"),
    "model.cache": ("KVCache",),
    "model.llama": ("Llama", "stacked", "unstacked"),
    "sharding": ("make_mesh",),
    "training.early_exit": ("exit_weights",),
    "training.layer_dropout": ("drop_rates",),
    "training.step": ("init_state", "make_train_step"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*_HOME, "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lsjax' has no attribute {name!r}")
    return getattr(import_module(f"lsjax.{_HOME[name]}"), name)


def train(
    config: "TrainConfig",
    workdir: "str | AnyPath",
    *,
    hooks: Sequence[Callable] | None = None,
    **options: Any,
) -> "TrainState":
    """Trains or resumes the run in `workdir`; returns the state after the last step.

    The directory holds the saved steps and metrics.jsonl; `load` reads it as a model.

    Args:
      hooks: functions that make hooks of the loop. The default scores every exit on held-out rows.
        These scores select the best saved steps.
      options: keywords of `train_run` (lsjax/training/run.py) and of `make_train_step`.

    Raises ConfigError or CheckpointError for bad input, and CheckpointError if another process
    trains there or the last step can't be saved.
    """
    # Imported here: they import grain and orbax, which decoding does not need.
    from lsjax.aot.remat import with_remat
    from lsjax.config import as_path
    from lsjax.evaluation.exits import evaluation_hook
    from lsjax.training.prepare import prepare_run
    from lsjax.training.run import train_run
    from lsjax.training.writer import Writer

    hooks = [evaluation_hook] if hooks is None else hooks
    with Writer(as_path(workdir), options.get("warn", print)) as writer:
        run = with_remat(prepare_run(config, writer), options.get("say", print))
        return train_run(run, hooks=hooks, **options)
