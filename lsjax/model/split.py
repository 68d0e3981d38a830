"""Joined matrices apart: queries, keys and values; gate and up.

Parameters, checkpoints and adapters keep them joined. A training step takes them apart once, where
that makes its products faster, and autodiff joins their gradients again.
"""

import jax
from flax import nnx

from lsjax.model.block import Linear
from lsjax.model.llama import Llama, with_parts


def split_matrices(model: Llama) -> Llama:
    """The same model, stacked, with a Linear for each part of qkv and gate_up."""
    block = model.layers
    attention, feed_forward = block.attention, block.feed_forward
    qkv = _parts(attention.qkv, slice(None, -2), -2, -1)
    gate_up = _parts(feed_forward.gate_up, 0, 1)
    block = with_parts(
        block,
        attention=with_parts(attention, qkv=qkv),
        feed_forward=with_parts(feed_forward, gate_up=gate_up),
    )
    return with_parts(model, layers=block)


def _parts(matrix: Linear, *slots: int | slice) -> nnx.List:
    """Slots of the last but one axis, each with its share of the bias and the adapter."""

    def part(slot) -> Linear:
        taken = jax.tree.map(lambda leaf: leaf[..., slot, :], matrix)
        if matrix.adapter is not None:
            taken.adapter.a = matrix.adapter.a  # [L, D, R] has no slots
        return taken

    return nnx.List(part(slot) for slot in slots)
