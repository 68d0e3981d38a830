"""Which exits are trained, and how much each of them counts."""

import math
from dataclasses import dataclass
from typing import Literal

from lsjax.config.errors import check


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """The early-exit loss (LayerSkip, eq. 5 and 6). Exits are numbered 1..L as in decoding; exit L
    is the model's normal output and always in the loss.

    LITE (Varshney et al., 2023): weights "uniform", curriculum "all" or "subset".
    """

    curriculum: Literal["none", "rotational", "gradual", "all", "subset"] = "none"
    """Exits in the loss beside exit L: none; every R-th, another set each step; one more every
    T / (2L) steps from the last down to the first; all; those of `exits`."""
    rotation: int = 8
    """R of the rotational curriculum."""
    exits: tuple[int, ...] = ()
    """Exits of the subset curriculum."""
    weights: Literal["paper", "uniform", "custom"] = "paper"
    """Before they are normalised over the exits that are on: e(l) of eq. 6, 1, or
    `custom_weights`."""
    e_scale: float = 1.0
    """Weight of the intermediate exits in the paper's e(l), from 0 to 1."""
    custom_weights: tuple[float, ...] = ()
    """One for each exit 1..L."""
    token_share: float = 1.0
    """Share of the labelled tokens that an intermediate exit is trained on, drawn anew for each
    exit and step; the loss stays the same on average."""
    target: Literal["labels", "final"] = "labels"
    """What an intermediate exit learns: the next token, or the distribution that exit L gives."""

    def __post_init__(self):
        check(
            self.curriculum in ("none", "rotational", "gradual", "all", "subset"),
            f"early_exit.curriculum {self.curriculum!r} is unknown: use none, rotational, gradual, "
            "all or subset",
        )
        check(
            self.weights in ("paper", "uniform", "custom"),
            f"early_exit.weights {self.weights!r} is unknown: use paper, uniform or custom",
        )
        check(
            self.target in ("labels", "final"),
            f"early_exit.target {self.target!r} is unknown: use labels or final",
        )
        check(self.rotation >= 1, f"early_exit.rotation {self.rotation} must be at least 1")
        check(
            (self.curriculum == "subset") == bool(self.exits),
            f"early_exit.exits {self.exits} belongs to the subset curriculum: give both or none",
        )
        check(0 <= self.e_scale <= 1, f"early_exit.e_scale {self.e_scale} must be from 0 to 1")
        check(
            (self.weights == "custom") == bool(self.custom_weights),
            f"early_exit.custom_weights {self.custom_weights} belongs to weights custom: give both "
            "or none",
        )
        check(
            not self.custom_weights
            or (
                all(0 <= weight < math.inf for weight in self.custom_weights)
                and self.custom_weights[-1] > 0
            ),
            f"early_exit.custom_weights {self.custom_weights} must not be negative, and the last "
            "one above 0",
        )
        check(
            0 < self.token_share <= 1,
            f"early_exit.token_share {self.token_share} must be above 0 and at most 1",
        )

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError where exits or weights do not belong to a model of L layers."""
        for exit in self.exits:
            check(
                1 <= exit <= num_layers,
                f"early_exit.exits has {exit}, but the exits are 1..{num_layers}",
            )
        check(
            len(self.custom_weights) in (0, num_layers),
            f"early_exit.custom_weights has {len(self.custom_weights)} weights, but there are "
            f"{num_layers} exits",
        )
