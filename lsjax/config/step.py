"""What one training step does."""

from dataclasses import dataclass
from typing import Literal, get_args

from lsjax.config.early_exit import EarlyExitConfig
from lsjax.config.errors import check
from lsjax.config.layer_dropout import LayerDropoutConfig
from lsjax.config.llama import LlamaConfig
from lsjax.config.lora import LoraConfig
from lsjax.config.optimizer import OptimizerConfig

AttentionKernel = Literal["auto", "xla", "splash", "flash", "cudnn"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """All that a training step depends on beside the model and the batch."""

    num_steps: int
    """T: optimizer steps of the whole run; schedules and curricula are stretched over them."""
    seed: int = 0
    """Of new weights, of the order of the rows, of layer dropout, and of the tokens that the exits
    are trained on."""
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (PaLM, 2022: 1e-4)."""
    micro_batches: int = 1
    """Parts of a batch that run one after the other, their gradients added up."""
    remat: Remat = "none"
    """What a layer keeps for its backward pass: all that it needs, or what jax's checkpoint policy
    of that name keeps; the rest is computed again. Policies that keep products keep the output of
    an attention kernel too; on GPUs it is kept instead of the projection that follows."""
    attention: AttentionKernel = "auto"
    """What computes it: auto is splash on TPUs, flash on GPUs and xla elsewhere, and cudnn or xla
    where these do not take the arrays (lsjax/model/self_attention.py)."""
    dtype: ComputeDtype = "auto"
    """Of the computation: auto is bfloat16 on accelerators and that of the parameters on CPUs."""

    def __post_init__(self):
        check(self.num_steps >= 1, f"num_steps {self.num_steps} must be at least 1")
        check(0 <= self.seed < 2**32, f"seed {self.seed} must be a whole number from 0 to 2^32 - 1")
        check(self.z_loss >= 0, f"z_loss {self.z_loss} must not be negative")
        check(self.micro_batches >= 1, f"micro_batches {self.micro_batches} must be at least 1")
        check(
            self.remat in get_args(Remat),
            f"remat {self.remat!r} is unknown: use {', '.join(get_args(Remat))}",
        )
        check(
            self.attention in get_args(AttentionKernel),
            f"attention {self.attention!r} is unknown: use {', '.join(get_args(AttentionKernel))}",
        )
        check(
            self.dtype in get_args(ComputeDtype),
            f"dtype {self.dtype!r} is unknown: use {', '.join(get_args(ComputeDtype))}",
        )
        check(
            self.optimizer.warmup_steps <= self.num_steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than num_steps "
            f"{self.num_steps}",
        )

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError where layers or exits are named that the model does not have."""
        self.layer_dropout.check_layers(model.num_layers)
        self.early_exit.check_layers(model.num_layers)

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError where the micro-batches do not share the rows evenly."""
        check(
            batch_size % self.micro_batches == 0,
            f"micro_batches {self.micro_batches} does not divide the batch of {batch_size} rows: "
            "choose a divisor",
        )
