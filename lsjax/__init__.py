"""LayerSkip in JAX: early-exit training and lossless self-speculative decoding of Llamas.

>>> import lsjax
>>> model = lsjax.load("path/to/model")
>>> engine = lsjax.Engine(model, lsjax.load_tokenizer("path/to/model"))
>>> print(engine.generate(["Once upon a time"], max_new_tokens=32)[0].text)
"""

import time
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

IMPORTED = time.time()  # about when the program began: other imports take seconds
# Public names by module. They are imported when they are used, because JAX is slow to import and
# processes that only tokenize do not need it.
_PUBLIC = {
    "checkpoints": ("load",),
    "checkpoints.huggingface": ("GenerationDefaults", "read_generation_defaults", "save"),
    "checkpoints.tensors": ("CheckpointError",),
    "config": (
        *("CheckpointConfig", "ConfigError", "DataConfig", "EarlyExitConfig", "EvaluationConfig"),
        "ExitBlocksConfig",
        *("LayerDropoutConfig", "LlamaConfig", "LoraConfig", "MeshConfig", "OptimizerConfig"),
        *("ProfileConfig", "RopeScaling", "StepConfig", "TrainConfig"),
    ),
    "data.tokenizer": ("Tokenizer", "TokenizerError"),
    "data.tokenizer_files": ("load_tokenizer",),
    "decoding.auto.adaptive": ("Adaptive",),
    "decoding.conversation": ("Conversation",),
    "decoding.completion": ("Completion",),
    "decoding.draft_vocabulary": ("DraftVocabulary",),
    "decoding.engine": ("Engine",),
    "decoding.exit_outputs": ("ExitOutputs",),
    "decoding.int8_drafts": ("Int8Drafts",),
    "decoding.request": ("Request",),
    "decoding.sampling": ("Sampling",),
    "decoding.self_speculative": ("SelfSpeculative",),
    "decoding.strategy": ("Autoregressive", "EarlyExit", "Strategy"),
    "evaluation.acceptance": ("Acceptance", "acceptance"),
    "model.cache": ("KVCache",),
    "model.exit_blocks": ("with_exit_blocks", "without_exit_blocks"),
    "model.exit_model": ("first_layers",),
    "model.llama": ("Llama", "stacked", "unstacked"),
    "model.matrices": ("with_int8",),
    "model.protocol": ("DecoderModel",),
    "reporting.record": ("Report",),
    "rollouts.engine": ("RolloutBatch", "Rollouts"),
    "rollouts.log_probs": ("rollout_exit_loss", "token_log_probs"),
    "sharding": ("make_mesh",),
    "training.early_exit": (
        *("cross_entropy", "curriculum", "divergence", "exit_weights", "layer_weights"),
        "loss_weights",
    ),
    "training.layer_dropout": ("drop_rates", "keep_mask"),
    "training.loss": ("early_exit_loss",),
    "training.run": ("Hook", "Interrupted", "TooManySkipped"),
    "training.step": ("TrainState", "init_state", "make_train_step"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*_HOME, "report", "train"]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from optax import GradientTransformation

    from lsjax.checkpoints import load as load
    from lsjax.checkpoints.huggingface import (
        GenerationDefaults as GenerationDefaults,
        read_generation_defaults as read_generation_defaults,
        save as save,
    )
    from lsjax.checkpoints.tensors import CheckpointError as CheckpointError
    from lsjax.cli.shown_run import MakeHook
    from lsjax.config import (
        AnyPath,
        CheckpointConfig as CheckpointConfig,
        ConfigError as ConfigError,
        DataConfig as DataConfig,
        EarlyExitConfig as EarlyExitConfig,
        EvaluationConfig as EvaluationConfig,
        ExitBlocksConfig as ExitBlocksConfig,
        LayerDropoutConfig as LayerDropoutConfig,
        LlamaConfig as LlamaConfig,
        LoraConfig as LoraConfig,
        MeshConfig as MeshConfig,
        OptimizerConfig as OptimizerConfig,
        ProfileConfig as ProfileConfig,
        RopeScaling as RopeScaling,
        StepConfig as StepConfig,
        TrainConfig as TrainConfig,
    )
    from lsjax.data.tokenizer import (
        Tokenizer as Tokenizer,
        TokenizerError as TokenizerError,
    )
    from lsjax.data.tokenizer_files import load_tokenizer as load_tokenizer
    from lsjax.decoding.auto.adaptive import Adaptive as Adaptive
    from lsjax.decoding.completion import Completion as Completion
    from lsjax.decoding.conversation import Conversation as Conversation
    from lsjax.decoding.draft_vocabulary import DraftVocabulary as DraftVocabulary
    from lsjax.decoding.engine import Engine as Engine
    from lsjax.decoding.exit_outputs import ExitOutputs as ExitOutputs
    from lsjax.decoding.int8_drafts import Int8Drafts as Int8Drafts
    from lsjax.decoding.request import Request as Request
    from lsjax.decoding.sampling import Sampling as Sampling
    from lsjax.decoding.self_speculative import SelfSpeculative as SelfSpeculative
    from lsjax.decoding.strategy import (
        Autoregressive as Autoregressive,
        EarlyExit as EarlyExit,
        Strategy as Strategy,
    )
    from lsjax.evaluation.acceptance import (
        Acceptance as Acceptance,
        acceptance as acceptance,
    )
    from lsjax.model.cache import KVCache as KVCache
    from lsjax.model.exit_blocks import (
        with_exit_blocks as with_exit_blocks,
        without_exit_blocks as without_exit_blocks,
    )
    from lsjax.model.exit_model import first_layers as first_layers
    from lsjax.model.llama import (
        Llama as Llama,
        stacked as stacked,
        unstacked as unstacked,
    )
    from lsjax.model.matrices import with_int8 as with_int8
    from lsjax.model.protocol import DecoderModel as DecoderModel
    from lsjax.reporting.record import Report as Report
    from lsjax.rollouts.engine import RolloutBatch as RolloutBatch, Rollouts as Rollouts
    from lsjax.rollouts.log_probs import (
        rollout_exit_loss as rollout_exit_loss,
        token_log_probs as token_log_probs,
    )
    from lsjax.sharding import make_mesh as make_mesh
    from lsjax.training.early_exit import (
        ExitLoss,
        ExitWeights,
        cross_entropy as cross_entropy,
        curriculum as curriculum,
        divergence as divergence,
        exit_weights as exit_weights,
        layer_weights as layer_weights,
        loss_weights as loss_weights,
    )
    from lsjax.training.layer_dropout import (
        DropRates,
        drop_rates as drop_rates,
        keep_mask as keep_mask,
    )
    from lsjax.training.loss import early_exit_loss as early_exit_loss
    from lsjax.training.run import (
        Hook as Hook,
        Interrupted as Interrupted,
        TooManySkipped as TooManySkipped,
    )
    from lsjax.training.step import (
        TrainState as TrainState,
        init_state as init_state,
        make_train_step as make_train_step,
    )

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("lsjax")
        if name not in _HOME:
            raise AttributeError(f"module 'lsjax' has no attribute {name!r}")
        return getattr(import_module(f"lsjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def train(
    config: "TrainConfig",
    workdir: "str | AnyPath",
    *,
    optimizer: "GradientTransformation | None" = None,
    drop_rates: "DropRates | None" = None,
    exit_weights: "ExitWeights | None" = None,
    exit_loss: "ExitLoss | None" = None,
    hooks: "Sequence[MakeHook] | None" = None,
    quiet: bool = False,
) -> "TrainState":
    """Trains or resumes the run in `workdir`, and shows what train.py shows, also in a notebook.

    Returns the state after the last step. The directory holds the saved steps and metrics.jsonl;
    `load` reads it as a model.

    Args:
      optimizer, drop_rates, exit_weights, exit_loss: as in `make_train_step`.
      hooks: functions that make hooks of the loop (lsjax/training/run.py). The default scores every
        exit on held-out rows, which selects the best saved steps, and writes a sample.
      quiet: prints nothing, and writes no sample.

    Raises ConfigError or CheckpointError for bad input, and CheckpointError if another process
    trains there or the last step can't be saved. Raises Interrupted, a KeyboardInterrupt, after
    SIGTERM or Ctrl-C, when the state is saved. Raises TooManySkipped if the loss stays not finite.
    """
    # Imported here: they import grain and orbax, which decoding does not need.
    from lsjax.cli.shown_run import shown_run
    from lsjax.config import as_path
    from lsjax.terminal import SafeConsole
    from lsjax.training.hosts import is_first
    from lsjax.training.recipe import Recipe

    given = dict(
        optimizer=optimizer, drop_rates=drop_rates, exit_weights=exit_weights, exit_loss=exit_loss
    )
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    console = SafeConsole(soft_wrap=True, quiet=quiet or not is_first())
    options = dict(hooks=hooks, samples=not quiet)
    return shown_run(config, as_path(workdir), console, recipe, **options)


def report(
    output: "str | AnyPath",
    *,
    model: "str | AnyPath | None" = None,
    config: "TrainConfig | None" = None,
    data: "DataConfig | None" = None,
    quiet: bool = False,
    **options: Any,
) -> "Report":
    """Trains, measures and writes the page of `lsjax report`; returns what is behind the page.

    The same call resumes it. `Report.answer` is the answer in words.

    Args:
      output: directory of the report.
      model: to train further or to report on. Without it, training starts from random weights.
      config: of the training; by default a recipe for the model, which needs `data`.
      data: replaces that of the configuration or run.
      quiet: prints nothing.
      options: task, training, minutes, seeds, prompts, new_tokens, exit_layers, num_draft_tokens
        and temperature, as the flags of `lsjax report`.

    Raises as `train` does.
    """
    # Imported here: they import grain and orbax, which decoding does not need.
    from lsjax.cli.report import report_of
    from lsjax.config import as_path
    from lsjax.terminal import SafeConsole

    console = SafeConsole(soft_wrap=True, quiet=quiet)
    given = dict(model=None if model is None else as_path(model), config=config, data=data)
    return report_of(as_path(output), console, **given, **options)
