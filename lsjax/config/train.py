"""Configuration of a training run."""

import dataclasses
import math
from dataclasses import dataclass

from lsjax.config.checked import Checked, bounded, check
from lsjax.config.data import DataConfig
from lsjax.config.llama import LlamaConfig
from lsjax.config.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked, prefix="mesh."):
    """Sizes of the mesh's axes; one of them may be -1, which takes the remaining devices.

    One device by default. lsjax/sharding.py explains how each axis shards the arrays.
    """

    data: int = 1
    """Devices over which the rows of a batch are sharded."""
    fsdp: int = 1
    """Devices over which weights are sharded along D; in training the rows too."""
    context: int = 1
    """Devices over which the positions of a row are sharded, in training only."""
    tensor: int = 1
    """Devices over which heads, feed-forward channels and vocabulary are sharded."""
    slices: int = bounded(1, low=1)
    """Slices of a TPU pod, joined by the data center's network. The other sizes are those of one
    slice, and the rows are sharded over all slices."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on a machine of that many devices; devices beyond the mesh stay idle.

        The data axis covers all slices. Raises ConfigError for a size below 1, for too few devices,
        and if the slices or, with a -1, the other sizes do not divide the number of devices.
        """
        sizes = dataclasses.asdict(self)
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        slices = sizes.pop("slices")
        for name, size in sizes.items():
            check(
                size == -1 or size >= 1,
                f"mesh.{name} {size} is not a size: choose 1 or more, or -1 for all the rest",
            )
        rest = [name for name, size in sizes.items() if size == -1]
        check(
            len(rest) <= 1,
            f"mesh.{' and mesh.'.join(rest)} are -1: use -1 for only one of them",
        )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        of_slice, over = divmod(num_devices, slices)
        fits = over == 0 and (of_slice % fixed == 0 if rest else fixed <= of_slice)
        several = "a multiple of " if rest or slices > 1 else ""
        check(
            fits,
            f"a mesh of {asked} needs {several}{fixed * slices} devices, but there are "
            f"{num_devices}: choose --mesh sizes that fit",
        )
        sizes |= dict.fromkeys(rest, of_slice // fixed)
        return sizes | {"data": sizes["data"] * slices}

    def check_decoding(self) -> None:
        """Raises ConfigError if this is a mesh for training only."""
        for name in ("slices", "context"):
            size = getattr(self, name)
            check(size == 1, f"mesh.{name} {size} is for training: decode without the flag")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked, prefix="checkpoints."):
    """Checkpoints of a run: when they are saved, and which are kept."""

    every: int = bounded(500, low=1)
    """Steps between checkpoints; the last step is saved too."""
    keep_last: int = bounded(2, low=1)
    """Number of newest checkpoints to keep."""
    keep_best: int = bounded(1, low=0)
    """Number of further checkpoints to keep, by lowest held-out loss of the last exit."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked, prefix="evaluation."):
    """Evaluation of the model during the run."""

    every: int = bounded(500, low=1)
    """Steps between evaluations; the last step is evaluated too."""
    batches: int = bounded(8, low=1)
    """Batches of held-out rows on which every exit is scored; always the same batches."""
    sample_tokens: int = bounded(64, low=0)
    """Length of the sample text that the model writes; 0 disables it."""
    sample_prompt: str = ""
    """Beginning of the sample text; the start of a held-out document by default."""
    exit_layer: int | None = None
    """Exit that drafts the sample text; a quarter of the layers by default."""
    num_draft_tokens: int = bounded(4, low=1)
    """Draft tokens per round of the sample text."""
    num_prompts: int = bounded(8, low=1)
    """Largest number of held-out beginnings in prompts.jsonl, for decoding afterwards."""
    prompt_tokens: int = bounded(32, low=1)
    """Tokens of such a beginning, at most half a row. A row's own prompt is used instead."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked, prefix="profile."):
    """A trace of a few steps, for xprof or TensorBoard, in the run's directory profile/."""

    start: int = bounded(10, low=1)
    """First step of the trace. A run that resumes within the trace writes the rest of it."""
    steps: int = bounded(0, low=0)
    """Number of steps to trace; 0 disables it."""
    all_processes: bool = False
    """Whether each process writes its own trace, not only process 0."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """A training run: its step, model, data, mesh, checkpoints and evaluation."""

    model: LlamaConfig | None = None
    """Shape of the model; by default that of the model in `init_from`."""
    init_from: str = ""
    """Hugging Face directory, GGUF file or run to start from; random parameters by default."""
    data: DataConfig = DataConfig()
    batch_size: int = bounded(low=1)
    """B: rows of a step on all devices and hosts together."""
    seq_len: int = bounded(low=2)
    """T: tokens of a row."""
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_skipped: int = bounded(10, low=1)
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = False
    """Whether the metrics are written for TensorBoard too (needs the tensorboard extra)."""
    wandb: bool = False
    """Whether the metrics go to Weights & Biases too (needs the wandb extra)."""
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        super().__post_init__()
        check(
            self.model is not None or self.init_from != "",
            "there is no model: give its shape in model, or a checkpoint in init_from",
        )
        check(
            self.lora.rank == 0 or self.init_from != "",
            f"lora.rank {self.lora.rank} trains adapters of a trained model: name its checkpoint "
            "in init_from",
        )
        check(
            self.profile.steps == 0 or self.profile.start <= self.num_steps,
            f"profile.start {self.profile.start} is after the last step: use 1..{self.num_steps}",
        )
        self.check_batch(self.batch_size)
        if self.model is not None:
            self.check_model(self.model)

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError if this run does not fit the model."""
        super().check_model(model)
        check(
            self.seq_len <= model.max_context,
            f"seq_len {self.seq_len} is longer than the model's context of {model.max_context}",
        )
        check(
            self.evaluation.sample_tokens == 0 or model.num_layers > 1,
            f"evaluation.sample_tokens {self.evaluation.sample_tokens} needs an exit that drafts, "
            "which a model of 1 layer does not have: set it to 0",
        )
        exit_layer = self.evaluation.exit_layer
        check(
            exit_layer is None or 1 <= exit_layer < model.num_layers,
            f"evaluation.exit_layer {exit_layer} is out of range: use 1..{model.num_layers - 1} "
            f"for a model of {model.num_layers} layers",
        )
