"""Which tensor of a checkpoint, by its Hugging Face name, is a part of which of our parameters."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lsjax.config import LlamaConfig

Index = tuple[slice, ...]  # what a shard is of an array, axis by axis


class Part(NamedTuple):
    """A tensor of the file as a part of one of our parameters."""

    tensor: str  # its Hugging Face name
    parameter: str  # path in Llama
    slot: int | slice | None  # where in the last but one axis; None: it is the whole parameter

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of this part of a parameter."""
        if self.slot is None:
            return parameter_shape
        *lead, slots, last = parameter_shape
        taken = range(slots)[self.slot]
        return (*lead, last) if isinstance(taken, int) else (*lead, len(taken), last)

    def stored_shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor in the file: kernels are [out, in] there, biases flat."""
        part = self.shape(parameter_shape)
        if self.is_kernel:
            return (math.prod(part[1:]), part[0])
        return (math.prod(part),) if self.parameter.endswith("bias") else part

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """This part of a parameter, or of a shard that has all slots, without a copy."""
        return parameter if self.slot is None else parameter[..., self.slot, :]

    def index(self, index: Index) -> Index:
        """Of a shard's share of this part, in the parameter's axes; the slots are not sharded."""
        return (*index[:-2], index[-1]) if isinstance(self.slot, int) else index

    def as_parameter(self, tensor: np.ndarray, parameter_shape: tuple[int, ...]) -> np.ndarray:
        """The file's tensor with the axes that it has in the parameter, without a copy."""
        inputs, *outputs = shape = self.shape(parameter_shape)
        if self.is_kernel:
            return np.moveaxis(tensor.reshape(*outputs, inputs), -1, 0)
        return tensor.reshape(shape)

    @property
    def is_kernel(self) -> bool:
        """Whether the file holds it transposed."""
        return self.parameter.endswith("kernel")


_LAYER = "model.layers.{}."
_QKV = "layers.{}.attention.qkv."
_GATE_UP = "layers.{}.feed_forward.gate_up."
# A K/V head's slots are its G queries, its key and its value.
TENSORS = (
    Part("model.embed_tokens.weight", "embedding", None),
    Part(_LAYER + "input_layernorm.weight", "layers.{}.attention_norm.scale", None),
    Part(_LAYER + "self_attn.q_proj.weight", _QKV + "kernel", slice(None, -2)),
    Part(_LAYER + "self_attn.k_proj.weight", _QKV + "kernel", -2),
    Part(_LAYER + "self_attn.v_proj.weight", _QKV + "kernel", -1),
    Part(_LAYER + "self_attn.q_proj.bias", _QKV + "bias", slice(None, -2)),
    Part(_LAYER + "self_attn.k_proj.bias", _QKV + "bias", -2),
    Part(_LAYER + "self_attn.v_proj.bias", _QKV + "bias", -1),
    Part(_LAYER + "self_attn.o_proj.weight", "layers.{}.attention.out.kernel", None),
    Part(_LAYER + "self_attn.o_proj.bias", "layers.{}.attention.out.bias", None),
    Part(_LAYER + "post_attention_layernorm.weight", "layers.{}.feed_forward_norm.scale", None),
    Part(_LAYER + "mlp.gate_proj.weight", _GATE_UP + "kernel", 0),
    Part(_LAYER + "mlp.up_proj.weight", _GATE_UP + "kernel", 1),
    Part(_LAYER + "mlp.gate_proj.bias", _GATE_UP + "bias", 0),
    Part(_LAYER + "mlp.up_proj.bias", _GATE_UP + "bias", 1),
    Part(_LAYER + "mlp.down_proj.weight", "layers.{}.feed_forward.down.kernel", None),
    Part(_LAYER + "mlp.down_proj.bias", "layers.{}.feed_forward.down.bias", None),
    Part("model.norm.weight", "norm.scale", None),
    Part("lm_head.weight", "head", None),
)


def model_parts(config: LlamaConfig) -> Iterable[Part]:
    """`TENSORS` for every layer; also those that this config has no parameter for."""
    for part in TENSORS:
        layers = config.num_layers if "{}" in part.tensor else 1
        for layer in range(layers):
            yield Part(part.tensor.format(layer), part.parameter.format(layer), part.slot)
