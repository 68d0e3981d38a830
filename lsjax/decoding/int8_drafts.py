"""Self-speculation whose drafts come from int8 copies of the first layers and of the head.

    layers 2..3                        v v v v
    layers 0..1                        v v v v     verification: all layers of all positions,
    int8 layers 0..1   p   a   b   c               which overwrite the draft's keys and values
    int8 head          a   b   c   -

A draft reads half the bytes that bfloat16 layers take. Its keys and values are rounded, so the
verification can't share them. The text is that of the full weights.
"""

from dataclasses import dataclass

import jax

from lsjax.config import check
from lsjax.decoding.draft import DraftArguments
from lsjax.decoding.self_speculative import SelfSpeculative, speculative_round
from lsjax.decoding.state import DecodeState
from lsjax.model.exit_model import first_layers
from lsjax.model.llama import Llama
from lsjax.model.matrices import with_int8
from lsjax.model.protocol import DecoderModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Arguments:
    """What a round takes at run time."""

    draft: DraftArguments
    drafter: Llama  # layers 0..E-1, int8


@dataclass(frozen=True)
class Int8Drafts(SelfSpeculative):
    """Same greedy tokens as Autoregressive, as `SelfSpeculative`, whose fields it has."""

    name = "int8_drafts"

    def arguments(self, model: DecoderModel) -> Int8Arguments:
        """The rounded layers, and what a draft takes. Raises ConfigError for other models than a
        Llama, and for one with an exit block here, which drafts from exact states."""
        check(isinstance(model, Llama), f"{self.name} needs a Llama, not {type(model).__name__}")
        check(
            f"{self.exit_layer}" not in model.exit_blocks,
            f"exit {self.exit_layer} has an exit block, which int8 layers do not feed: use "
            "--draft-weights int8-head",
        )
        drafter = with_int8(first_layers(model, self.exit_layer))
        draft = DraftArguments.create(drafter, self.vocabulary, self.draft_confidence)
        return Int8Arguments(draft, drafter)

    def round(
        self, model: DecoderModel, state: DecodeState, arguments: Int8Arguments
    ) -> DecodeState:
        """One round."""
        given = arguments.drafter, model, 0, state, arguments.draft
        return speculative_round(self, *given)[0]
