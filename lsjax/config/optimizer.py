"""How gradients become steps."""

from dataclasses import dataclass
from typing import Literal

from lsjax.config.errors import check


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019). The paper gives learning rates only: all else here is
    our choice, the usual one for Llamas."""

    learning_rate: float = 3e-4
    """The highest, after warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    final_share: float = 0.1
    """Of the learning rate, at the end of the run; read by cosine and linear."""
    b1: float = 0.9
    """Decay of the mean of the gradients."""
    b2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean of the squares."""
    weight_decay: float = 0.1
    """Of matrices and tables; norms and biases do not decay."""
    clip_norm: float | None = 1.0
    """Norm to which the gradient is shortened where it is longer; None leaves it as it is."""

    def __post_init__(self):
        check(
            self.schedule in ("constant", "cosine", "linear"),
            f"optimizer.schedule {self.schedule!r} is unknown: use constant, cosine or linear",
        )
        check(
            self.learning_rate >= 0,
            f"optimizer.learning_rate {self.learning_rate} must not be negative",
        )
        check(
            self.warmup_steps >= 0,
            f"optimizer.warmup_steps {self.warmup_steps} must not be negative",
        )
        check(
            0 <= self.final_share <= 1,
            f"optimizer.final_share {self.final_share} must be from 0 to 1",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optimizer.{name} {value} must be at least 0 and below 1")
        check(self.eps > 0, f"optimizer.eps {self.eps} must be above 0")
        check(
            self.weight_decay >= 0,
            f"optimizer.weight_decay {self.weight_decay} must not be negative",
        )
        check(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm {self.clip_norm} must be above 0, or None for no clipping",
        )
