"""An exit of a Llama as a model of its own: a draft model for other engines."""

from dataclasses import replace

from flax import nnx

from lsjax.config import check
from lsjax.model.llama import Llama, unstacked, with_parts


def first_layers(model: Llama, depth: int) -> Llama:
    """Layers 0..depth-1 with norm and head, unstacked, as a model of its own."""
    config = model.config
    check(
        1 <= depth <= config.num_layers,
        f"the model has {config.num_layers} layers, so exit {depth} is out of range: use "
        f"1..{config.num_layers}",
    )
    shorter = replace(
        config,
        num_layers=depth,
        no_rope_layers=tuple(layer for layer in config.no_rope_layers if layer < depth),
        full_attention_layers=tuple(one for one in config.full_attention_layers if one < depth),
    )
    blocks = list(unstacked(model).layers)[:depth]
    return with_parts(model, config=shorter, layers=nnx.List(blocks), exit_blocks=nnx.Dict())
