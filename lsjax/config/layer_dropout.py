"""How often layers are left out in training."""

from dataclasses import dataclass
from typing import Literal

from lsjax.config.errors import check


@dataclass(frozen=True, kw_only=True)
class LayerDropoutConfig:
    """Rate at which layer l is left out at step t: p(l, t) = S(t) D(l) p_max (LayerSkip, eq. 2).

    LayerSkip: the defaults with a p_max; from scratch also schedule "exponential". LayerDrop (Fan
    et al., 2020): distribution "uniform", skip "batch". PLD (Zhang and He, 2020): distribution
    "linear", schedule "saturating", p_max = 1 - its keep rate, skip "batch", rescale. "Don't Drop
    Dropout" (Elhoushi et al., 2026): distribution "linear", schedule "decreasing", rescale.
    """

    p_max: float = 0.0
    """Rate of the layer that is left out most; 0 is no layer dropout."""
    distribution: Literal["exponential", "linear", "uniform"] = "exponential"
    """D(l): 2^(l / (L-1)) - 1 (eq. 3), l / (L-1), or 1."""
    layers: tuple[int, ...] | None = None
    """Layers 0..L-1 that may be left out; all of them by default."""
    schedule: Literal["constant", "exponential", "decreasing", "saturating"] = "constant"
    """S(t): 1, 2^(t / (T-1)) - 1 (eq. 4), 1 - t / (T-1), or 1 - exp(-gamma t)."""
    gamma: float | None = None
    """Of the saturating schedule, per step; 100 / T by default, as in PLD."""
    rescale: bool = False
    """Whether what a layer adds, when kept, is divided by 1 - p; the paper does not."""
    skip: Literal["mask", "gather", "batch"] = "mask"
    """How a layer is left out. mask: of each sequence by itself, as in the paper; it is computed
    for all of them, and its effect dropped. gather: of each sequence, and computed only for those
    that keep it, which are as many as one of a few fixed numbers. batch: of all at once."""

    def __post_init__(self):
        check(0 <= self.p_max <= 1, f"layer_dropout.p_max {self.p_max} must be from 0 to 1")
        check(
            self.distribution in ("exponential", "linear", "uniform"),
            f"layer_dropout.distribution {self.distribution!r} is unknown: use exponential, "
            "linear or uniform",
        )
        check(
            self.schedule in ("constant", "exponential", "decreasing", "saturating"),
            f"layer_dropout.schedule {self.schedule!r} is unknown: use constant, exponential, "
            "decreasing or saturating",
        )
        check(
            self.skip in ("mask", "gather", "batch"),
            f"layer_dropout.skip {self.skip!r} is unknown: use mask, gather or batch",
        )
        check(
            self.gamma is None or self.gamma > 0,
            f"layer_dropout.gamma {self.gamma} must be above 0",
        )

    def check_layers(self, num_layers: int) -> None:
        """Raises ConfigError where `layers` names one that a model of L layers does not have."""
        for layer in self.layers or ():
            check(
                0 <= layer < num_layers,
                f"layer_dropout.layers has {layer}, but the layers are 0..{num_layers - 1}",
            )
