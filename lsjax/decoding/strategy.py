"""The interface of a decoding method."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

from lsjax.config import LlamaConfig, check
from lsjax.decoding.state import DecodeState
from lsjax.model.llama import Llama

if TYPE_CHECKING:
    from lsjax.decoding.draft import DraftVocabulary
    from lsjax.decoding.engine import Engine


class Strategy(ABC):
    """A decoding method. Frozen and hashable.

    Only `program` decides what is compiled; each call passes `arguments`. So strategies that
    differ only in arguments share a compiled loop.
    """

    name: ClassVar[str]
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_confidence: float | None = None
    vocabulary: "DraftVocabulary | None" = None  # tokens that may be drafted, all by default
    lengths: tuple[int, ...] = (0,)  # draft lengths, ascending

    @property
    def draft_vocab(self) -> int | None:
        """Number of tokens that may be drafted; None for all."""
        return None if self.vocabulary is None else len(self.vocabulary)

    @property
    def slack(self) -> int:
        """Cache slots that a round may write: for the pending token and the longest draft."""
        return 1 + self.lengths[-1]

    @property
    def program(self) -> Hashable:
        """Strategies with equal keys share a compiled program."""
        return self

    def validate(self, config: LlamaConfig) -> None:  # noqa: B027
        """Raises ConfigError if the strategy does not fit the model."""

    def depth(self, config: LlamaConfig) -> int:
        """Layers run for each committed token: all, or the exit's."""
        return config.num_layers

    def arguments(self, model: Llama) -> Any:
        """A pytree of arrays that `step` needs beside the model."""
        return ()

    def prepared(self, engine: "Engine") -> "Strategy":
        """The strategy for this engine; one that needs the costs of rounds measures them."""
        return self

    def first_guess(self, batch: int) -> Any:
        """What the strategy knows of each row before its first round; None for most."""
        return None

    @abstractmethod
    def step(self, model: Llama, state: DecodeState, arguments: Any) -> DecodeState:
        """One round: at least one token for every running row."""


def check_exit(exit_layer: int, last: int) -> None:
    """Raises ConfigError for an exit that is not in 1..last."""
    check(
        1 <= exit_layer <= last,
        f"exit layer {exit_layer} is out of range: use --exit-layer 1..{last}",
    )
