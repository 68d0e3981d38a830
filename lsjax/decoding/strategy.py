"""Interface of a decoding method, and the two methods that produce one token per round."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Int

from lsjax.config import check
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.state import DecodeState
from lsjax.model.protocol import DecoderModel, Sizes, run_past_exits


class Strategy(ABC):
    """A decoding method. Frozen and hashable.

    Only `program` decides what is compiled; each call passes `arguments`. So strategies that
    differ only in arguments share a compiled loop.
    """

    name: ClassVar[str]
    exit_layer: int | None = None  # E: layers 0..E-1 run; a number, not an index
    num_draft_tokens: int | None = None
    draft_confidence: float | None = None
    vocabulary: DraftVocabulary | None = None  # tokens that may be drafted, all by default
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

    exits: tuple[int, ...] = ()  # those that draft, ascending
    pauses: ClassVar[bool] = False  # whether rounds stop at times, for a `pause`

    def validate(self, sizes: Sizes) -> None:  # noqa: B027
        """Raises ConfigError if the strategy does not fit the model."""

    def depth(self, sizes: Sizes) -> int:
        """Layers run for each committed token: all, or the exit's."""
        return sizes.num_layers

    def arguments(self, model: DecoderModel) -> Any:
        """A pytree of arrays that `round` needs beside the model."""
        return ()

    def first_guess(self, batch: int, lesson: Any = None) -> Any:
        """What the strategy knows of each row before its first round; None for most. lesson: of the
        last text, if there is one."""
        return None

    def lesson(self, state: DecodeState, row: int) -> Any:
        """What a row that ends teaches about the next texts, on the host; None for most."""
        return None

    def wants_another(self, state: DecodeState) -> Bool[Array, ""] | bool:
        """Whether another round follows before a pause."""
        return True

    def pause(self, model: DecoderModel, state: DecodeState, most: Int[Array, ""]) -> DecodeState:
        """What the host runs between calls of rounds if the strategy `pauses`, as a program of its
        own. most: tokens of a row."""
        return state

    @abstractmethod
    def round(self, model: DecoderModel, state: DecodeState, arguments: Any) -> DecodeState:
        """One round: at least one token for every running row."""


def with_next_token(
    model: DecoderModel, state: DecodeState, depth: int, exits: tuple[int, ...] = ()
) -> DecodeState:
    """Runs the pending token of each row through the layers and the head; appends a token. exits:
    whose part of the cache is written too."""
    positions_B1 = state.length_B[:, None] - 1
    x_B1D = model.embed(state.pending_B[:, None], positions_B1)
    x_B1D, cache = run_past_exits(model, exits, depth, x_B1D, positions_B1, state.cache)
    return state.with_cache(cache).append(model.unembed(x_B1D[:, 0]))


@dataclass(frozen=True)
class Autoregressive(Strategy):
    """Decoding with all layers: the reference for every other strategy."""

    name = "autoregressive"

    def round(self, model: DecoderModel, state: DecodeState, arguments: tuple[()]) -> DecodeState:
        """One token for every running row."""
        return with_next_token(model, state, self.depth(model))


@dataclass(frozen=True)
class EarlyExit(Autoregressive):
    """Decoding with the first layers and the shared head, without verification."""

    name = "early_exit"
    exit_layer: int = field()

    def validate(self, sizes: Sizes) -> None:
        """Raises ConfigError unless 1 <= exit_layer <= L."""
        check_exit(self.exit_layer, sizes.num_layers)

    def depth(self, sizes: Sizes) -> int:
        """The exit layer."""
        return self.exit_layer


def check_exit(exit_layer: int, last: int) -> None:
    """Raises ConfigError for an exit that is not in 1..last."""
    check(
        1 <= exit_layer <= last,
        f"exit layer {exit_layer} is out of range: use --exit-layer 1..{last}",
    )


class Speculative(Strategy):
    """A strategy whose rounds draft and verify. accept: rule (acceptance.py); None is lossless."""

    accept: Callable | None = None

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits that draft, ascending."""
        return (self.exit_layer,)

    @property
    def program(self) -> Hashable:
        """What decides about the compiled program. `arguments` carries the rest at run time."""
        is_int8 = self.vocabulary is not None and self.vocabulary.is_int8
        return type(self), self.exits, self.lengths, self.draft_vocab, is_int8, self.accept

    def validate(self, sizes: Sizes) -> None:
        """Raises ConfigError if an exit, a length or the confidence is out of range, or the draft
        vocabulary does not fit the model."""
        for exit_layer in self.exits:
            check_exit(exit_layer, sizes.num_layers - 1)  # the draft does not run all layers
        confidence, drafts, most = self.draft_confidence, self.lengths[-1], sizes.max_context
        check(
            confidence is None or 0 <= confidence <= 1,
            f"draft_confidence {confidence} is out of range: use a value from 0 to 1",
        )
        check(0 <= drafts <= most, f"num_draft_tokens {drafts} is out of range: use 0..{most}")
        if self.vocabulary is not None:
            self.vocabulary.validate(sizes)
