"""One token per round: with the full model, or from an early exit without verification."""

from dataclasses import dataclass, field

from lsjax.config import LlamaConfig
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy, check_exit
from lsjax.model.llama import Llama


@dataclass(frozen=True)
class Autoregressive(Strategy):
    """Decoding with all layers: the reference for every other strategy."""

    name = "autoregressive"

    def step(self, model: Llama, state: DecodeState, arguments: tuple[()]) -> DecodeState:
        """The next token of every row."""
        return next_token(model, state, model.config.num_layers)


@dataclass(frozen=True)
class EarlyExit(Strategy):
    """Decoding with the first layers and the shared head, without verification."""

    name = "early_exit"
    exit_layer: int = field()

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError unless 1 <= exit_layer <= L."""
        check_exit(self.exit_layer, config.num_layers)

    def depth(self, config: LlamaConfig) -> int:
        """The exit layer."""
        return self.exit_layer

    def step(self, model: Llama, state: DecodeState, arguments: tuple[()]) -> DecodeState:
        """The next token of every row."""
        return next_token(model, state, self.exit_layer)


def next_token(model: Llama, state: DecodeState, depth: int) -> DecodeState:
    """Runs the pending token through `depth` layers and the head, and appends a token."""
    x_BTD = model.embed(state.pending_B[:, None])
    positions_BT = state.length_B[:, None] - 1
    x_BTD, cache = model.run_layers(x_BTD, 0, depth, positions_BT, state.cache)
    return state.with_cache(cache).append(model.unembed(x_BTD[:, 0]))
