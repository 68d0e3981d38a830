"""Finetuning of low-rank adapters beside frozen weights."""

from dataclasses import dataclass
from typing import Literal, get_args

from lsjax.config.errors import check

Target = Literal["qkv", "out", "gate_up", "down"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (Hu et al., 2021): W + alpha / rank A B in place of W, where only A and B are trained.

    qkv is one matrix of queries, keys and values, and gate_up one of two, so they share an A.
    """

    rank: int = 0
    """Columns of A and rows of B; 0 trains the whole model."""
    alpha: float = 16.0
    """What A B is multiplied by, times the rank."""
    targets: tuple[Target, ...] = ("qkv", "out", "gate_up", "down")
    """Matrices of each layer that get an adapter."""

    def __post_init__(self):
        check(self.rank >= 0, f"lora.rank {self.rank} must be at least 1, or 0 for no adapters")
        check(self.alpha > 0, f"lora.alpha {self.alpha} must be above 0")
        known = get_args(Target)
        for target in self.targets:
            check(target in known, f"lora.targets has {target!r}, but may have {', '.join(known)}")
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"lora.targets {self.targets} must name at least one matrix, and each once",
        )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank
