"""Models and training runs in files: what is read, what is written, and what is refused."""

from lsjax.checkpoints.fingerprint import fingerprints
from lsjax.checkpoints.huggingface import (
    GenerationDefaults,
    check_destination,
    read_generation_defaults,
    save,
)
from lsjax.checkpoints.resume import check_same_run
from lsjax.checkpoints.run_directory import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    METRICS,
    RunSource,
    begin_run,
    held_out_losses,
    is_run,
    read_metrics,
    read_run_config,
)
from lsjax.checkpoints.saved_step import saved_steps
from lsjax.checkpoints.saving import Checkpoints
from lsjax.checkpoints.tensors import (
    CheckpointError,
    TensorSource,
    assemble,
    load,
    named_parameters,
    open_checkpoint,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EVALUATION",
    "METRICS",
    "CheckpointError",
    "Checkpoints",
    "GenerationDefaults",
    "RunSource",
    "TensorSource",
    "assemble",
    "begin_run",
    "check_destination",
    "check_same_run",
    "fingerprints",
    "held_out_losses",
    "is_run",
    "load",
    "named_parameters",
    "open_checkpoint",
    "read_generation_defaults",
    "read_metrics",
    "read_run_config",
    "save",
    "saved_steps",
]
