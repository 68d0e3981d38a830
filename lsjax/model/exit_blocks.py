"""Exit blocks: a small layer behind an exit, so that a model that may not change drafts well.

Exit block E reads the states after layer E-1. It predicts what the full model says, through the
model's own final norm and head (Kangaroo; Liu et al., 2024). The layers stay as they are. So their
keys, values and exit states are exact, and the verification shares them. A block has a cache of its
own. Only drafts depend on it.

    layers E..L-1   verification, from the exit state
         |
         +------->  exit block E  -->  norm, head: drafts
         |
    layers 0..E-1
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from lsjax.config import BlockStart, check
from lsjax.model.block import Block
from lsjax.model.llama import Llama, with_parts
from lsjax.model.parameters import map_named

ATTENTION = ("attention_norm", "attention", "attention_post_norm")
FEED_FORWARD = ("feed_forward_norm", "feed_forward", "feed_forward_post_norm")


def with_exit_blocks(
    model: Llama,
    exits: Iterable[int],
    *,
    feed_forward: bool = True,
    start: BlockStart = "copy",
    seed: int = 0,
) -> Llama:
    """The model with blocks of these exits alone, in the dtype of its matrices. It shares all other
    arrays. Blocks that it has already stay as they are.

    start: the copy of the layer above the exit, or a random block whose output is the exit state.
    Raises ConfigError for an exit out of range.
    """
    last, blocks = model.num_layers - 1, {}
    for exit_layer in exits:
        check(1 <= exit_layer <= last, f"exit block {exit_layer} is out of range: use 1..{last}")
        if f"{exit_layer}" in model.exit_blocks:
            blocks[f"{exit_layer}"] = model.exit_blocks[f"{exit_layer}"]
            continue
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), exit_layer))
        settings = dict(dtype=model.compute_dtype, rngs=rngs, feed_forward=feed_forward)
        block = Block(model.config, **settings)
        if start == "copy":
            layer, parts = _layer(model, exit_layer), ATTENTION + FEED_FORWARD * feed_forward
            block = with_parts(block, **{name: getattr(layer, name) for name in parts})
        else:
            block = map_named(_silent, block)
        blocks[str(exit_layer)] = block
    return with_parts(model, exit_blocks=nnx.Dict(blocks))


def block_exits(model: Llama) -> tuple[int, ...]:
    """Exits that have a block, in ascending order."""
    return tuple(sorted(map(int, model.exit_blocks)))


def without_exit_blocks(model: Llama) -> Llama:
    """The same model without its blocks."""
    return with_parts(model, exit_blocks=nnx.Dict())


def _layer(model, index):
    if model.is_stacked:
        return jax.tree.map(lambda leaf: leaf[index], model.layers)
    return jax.tree.map(lambda leaf: leaf, model.layers[index])


def _silent(name, leaf):
    """Zeros in the matrices that write to the residual stream."""
    writes = name.endswith(("out.kernel", "out.bias", "down.kernel", "down.bias"))
    return jnp.zeros_like(leaf) if writes else leaf
