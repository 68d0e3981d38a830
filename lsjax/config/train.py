"""A whole training run: its parts beside the step, and the path of a saved one."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from lsjax.config.checked import Checked, bounded, check
from lsjax.config.data import DataConfig
from lsjax.config.llama import LlamaConfig
from lsjax.config.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked, prefix="mesh."):
    """Sizes of the mesh's axes; -1 on one of them is what the others leave of the devices.

    One device by default. lsjax/sharding.py says how each axis shards the arrays.
    """

    data: int = 1
    """Devices over which the rows of a batch are sharded."""
    fsdp: int = 1
    """Devices over which weights are sharded along the model's width, and in training rows too."""
    tensor: int = 1
    """Devices over which heads, feed-forward channels and vocabulary are sharded."""

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on a machine of that many devices; those beyond the mesh stay idle.

        Raises ConfigError where a size is none, the devices do not suffice, or a -1 does not
        come out even.
        """
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            check(
                size == -1 or size >= 1,
                f"mesh.{name} {size} is not a size: choose 1 or more, or -1 for all that is left",
            )
        rest = [name for name, size in sizes.items() if size == -1]
        check(
            len(rest) <= 1,
            f"mesh.{' and mesh.'.join(rest)} are -1: leave the rest to one of them only",
        )
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        check(
            fixed <= num_devices,
            f"a mesh of {asked} needs {fixed} devices, but there are {num_devices}: "
            "choose smaller --mesh sizes",
        )
        check(
            not rest or num_devices % fixed == 0,
            f"a mesh of {asked} does not fit {num_devices} devices: {fixed} does not divide them",
        )
        return sizes | dict.fromkeys(rest, num_devices // fixed)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked, prefix="checkpoints."):
    """When a run is saved, and what stays."""

    every: int = bounded(500, low=1)
    """Steps between checkpoints; the last step has one too."""
    keep_last: int = bounded(2, low=1)
    """Newest checkpoints that stay."""
    keep_best: int = bounded(1, low=0)
    """Checkpoints that stay beside them, by the held-out loss of the last exit; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked, prefix="evaluation."):
    """What is shown of the model on the way."""

    every: int = bounded(500, low=1)
    """Steps between evaluations; the last step has one too."""
    batches: int = bounded(8, low=1)
    """Batches of held-out rows that every exit is scored on; the same ones each time."""
    sample_tokens: int = bounded(64, low=0)
    """Length of the text that the model writes; 0 for none."""
    sample_prompt: str = ""
    """What it continues; the start of a held-out document by default."""
    exit_layer: int | None = None
    """Exit that drafts it; a quarter of the layers by default."""
    num_draft_tokens: int = bounded(4, low=1)
    """Drafts a round."""
    num_prompts: int = bounded(8, low=1)
    """How many held-out beginnings prompts.jsonl has at most, for decoding afterwards."""
    prompt_tokens: int = bounded(32, low=1)
    """Their length, at most half of a row; a row of a prompt and its response gives its prompt."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """A training step, and what it is done with: model, data, devices, checkpoints."""

    model: LlamaConfig | None = None
    """The model's shape; that of the model in `init_from` by default."""
    init_from: str = ""
    """Hugging Face directory, GGUF file or run to start from; random parameters by default."""
    data: DataConfig = DataConfig()
    batch_size: int = bounded(low=1)
    """B: rows of a step, over all devices and hosts."""
    seq_len: int = bounded(low=2)
    """T: tokens of a row."""
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_skipped: int = bounded(10, low=1)
    """Steps in a row whose loss or gradient is not finite that stop the run."""
    tensorboard: bool = False
    """Whether the metrics go to TensorBoard too (needs the tensorboard extra)."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.model is not None or self.init_from != "",
            "there is no model: give its shape in model, or a checkpoint in init_from",
        )
        check(
            self.lora.rank == 0 or self.init_from != "",
            f"lora.rank {self.lora.rank} trains adapters of a model that has learned: name its "
            "checkpoint in init_from",
        )
        self.check_batch(self.batch_size)
        if self.model is not None:
            self.check_model(self.model)

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError where this run asks for what the model does not have."""
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
            f"evaluation.exit_layer {exit_layer} is not in 1..{model.num_layers - 1}, which can "
            f"draft for a model of {model.num_layers} layers",
        )


def split_step(path: str | Path) -> tuple[Path, int | str | None]:
    """`runs/a@200` is step 200 of runs/a, `runs/a@best` its best one, any other path is itself.

    A file or directory that has such a name is that file or directory.
    Raises ConfigError for what follows the @ of an existing directory and is neither.
    """
    path = Path(path)
    directory, at, step = path.name.rpartition("@")
    run = path.with_name(directory) if directory else path
    if not at or not directory or path.exists() or not run.is_dir():
        return path, None
    check(
        step == "best" or re.fullmatch(r"\d+", step) is not None,
        f"{path}: {step!r} is no step of {run}: write a number, or best",
    )
    return run, step if step == "best" else int(step)
