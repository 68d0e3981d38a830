"""A whole training run."""

from dataclasses import dataclass

from lsjax.config.data import DataConfig
from lsjax.config.errors import check
from lsjax.config.llama import LlamaConfig
from lsjax.config.mesh import MeshConfig
from lsjax.config.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and what stays."""

    every: int = 500
    """Steps between checkpoints; the last step has one too."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: int = 1
    """Checkpoints that stay beside them, by the held-out loss of the last exit; 0 for none."""

    def __post_init__(self):
        check(self.every >= 1, f"checkpoints.every {self.every} must be at least 1")
        check(self.keep_last >= 1, f"checkpoints.keep_last {self.keep_last} must be at least 1")
        check(self.keep_best >= 0, f"checkpoints.keep_best {self.keep_best} must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is shown of the model on the way."""

    every: int = 500
    """Steps between evaluations; the last step has one too."""
    batches: int = 8
    """Batches of held-out rows that every exit is scored on; the same ones each time."""
    sample_tokens: int = 64
    """Length of the text that the model writes; 0 for none."""
    sample_prompt: str = ""
    """What it continues; the start of a held-out document by default."""
    exit_layer: int | None = None
    """Exit that drafts it; a quarter of the layers by default."""
    num_draft_tokens: int = 4
    """Drafts a round."""
    num_prompts: int = 8
    """How many held-out beginnings prompts.jsonl has at most, for decoding afterwards."""
    prompt_tokens: int = 32
    """Their length, at most half of a row; a row of a prompt and its response gives its prompt."""

    def __post_init__(self):
        check(self.every >= 1, f"evaluation.every {self.every} must be at least 1")
        check(self.batches >= 1, f"evaluation.batches {self.batches} must be at least 1")
        check(
            self.sample_tokens >= 0,
            f"evaluation.sample_tokens {self.sample_tokens} must not be negative",
        )
        for name in ("num_draft_tokens", "num_prompts", "prompt_tokens"):
            value = getattr(self, name)
            check(value >= 1, f"evaluation.{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """A training step, and what it is done with: model, data, devices, checkpoints."""

    model: LlamaConfig | None = None
    """The model's shape; that of the model in `init_from` by default."""
    init_from: str = ""
    """Hugging Face directory, GGUF file or run to start from; random parameters by default."""
    data: DataConfig = DataConfig()
    batch_size: int
    """B: rows of a step, over all devices and hosts."""
    seq_len: int
    """T: tokens of a row."""
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite that stop the run."""
    tensorboard: bool = False
    """Whether the metrics go to TensorBoard too (needs the tensorboard extra)."""

    def __post_init__(self):
        super().__post_init__()
        check(self.batch_size >= 1, f"batch_size {self.batch_size} must be at least 1")
        check(self.seq_len >= 2, f"seq_len {self.seq_len} must be at least 2")
        check(self.max_skipped >= 1, f"max_skipped {self.max_skipped} must be at least 1")
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
