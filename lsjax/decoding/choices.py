"""What one compiled program of self-speculation serves."""

from collections.abc import Iterable
from dataclasses import dataclass

from lsjax.config import check


@dataclass(frozen=True)
class Choices:
    """Exits and draft lengths that one compiled program serves, each in rising order.

    The layers between two exits are a segment under `lax.cond`, and there is a verification for
    each length, for d + 1 positions. A draft that ends early takes the shortest that holds it.
    """

    exit_layers: tuple[int, ...]
    num_draft_tokens: tuple[int, ...]

    def __post_init__(self):
        for name, values in vars(self).items():
            check(
                bool(values) and list(values) == sorted(set(values)),
                f"{name} {values} must rise from one to the next",
            )

    @classmethod
    def covering(cls, exit_layers: Iterable[int], num_draft_tokens: Iterable[int]) -> "Choices":
        """Of these, in any order and as often as they come."""
        return cls(tuple(sorted(set(exit_layers))), tuple(sorted(set(num_draft_tokens))))
