"""The table of parameters: path in a Llama, sharding, and names in files.

Import, export, saved runs and sharding read it. A parameter that the block gains is one more line.
Paths are those of stacked layers ("layers.attention.qkv.kernel"); separate layers have a number
more ("layers.3.attention.qkv.kernel"). Letters as in llama.py.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.sharding import ROWS, fitted

Names = Literal["huggingface", "gguf"]


class FileTensor(NamedTuple):
    """A tensor of a file: its names there, without layer and ".weight" or ".bias", and its slot."""

    huggingface: str
    gguf: str
    # Index in the parameter's last but one axis; None where the tensor is the whole parameter.
    slot: int | slice | None = None


class Parameter(NamedTuple):
    """One parameter, or that of every layer.

    sharding: choices of the mesh's axes for each axis; the first that divides is taken.
    """

    path: str
    tensors: tuple[FileTensor, ...]
    sharding: tuple[P, ...] = (P(),)


# A K/V head's slots are its G queries, its key and its value.
_QKV = (
    FileTensor("self_attn.q_proj", "attn_q", slice(None, -2)),
    FileTensor("self_attn.k_proj", "attn_k", -2),
    FileTensor("self_attn.v_proj", "attn_v", -1),
)
_OUT = (FileTensor("self_attn.o_proj", "attn_output"),)
_GATE_UP = (FileTensor("mlp.gate_proj", "ffn_gate", 0), FileTensor("mlp.up_proj", "ffn_up", 1))
_DOWN = (FileTensor("mlp.down_proj", "ffn_down"),)
# A lookup in a table sharded along V costs a sum of [B, T, D]; unembedding costs nothing.
_TABLE = (P("tensor", "fsdp"), P(None, ("fsdp", "tensor")))
_ATTENTION = "layers.attention."
_FEED_FORWARD = "layers.feed_forward."

PARAMETERS = (
    Parameter("embedding", (FileTensor("model.embed_tokens", "token_embd"),), _TABLE),
    Parameter("layers.attention_norm.scale", (FileTensor("input_layernorm", "attn_norm"),)),
    # [D, K, G + 2, H]; along D where the K/V heads do not divide.
    Parameter(_ATTENTION + "qkv.kernel", _QKV, (P("fsdp", "tensor"), P(("fsdp", "tensor")))),
    Parameter(_ATTENTION + "qkv.bias", _QKV, (P("tensor"),)),
    Parameter(_ATTENTION + "out.kernel", _OUT, (P("tensor", "fsdp"),)),  # [N * H, D]
    Parameter(_ATTENTION + "out.bias", _OUT),
    Parameter(
        "layers.feed_forward_norm.scale", (FileTensor("post_attention_layernorm", "ffn_norm"),)
    ),
    # [D, 2, F]
    Parameter(_FEED_FORWARD + "gate_up.kernel", _GATE_UP, (P("fsdp", None, "tensor"),)),
    Parameter(_FEED_FORWARD + "gate_up.bias", _GATE_UP, (P(None, "tensor"),)),
    Parameter(_FEED_FORWARD + "down.kernel", _DOWN, (P("tensor", "fsdp"),)),  # [F, D]
    Parameter(_FEED_FORWARD + "down.bias", _DOWN),
    Parameter("norm.scale", (FileTensor("model.norm", "output_norm"),)),
    Parameter("head", (FileTensor("lm_head", "output"),), _TABLE),
)
_BY_PATH = {parameter.path: parameter for parameter in PARAMETERS}
_LAYER = {"huggingface": "model.layers.{}.", "gguf": "blk.{}."}
# Caches, states and batches, by the end of their path; names of arrays say their axes.
_ARRAYS = (
    (r"table_ND$", _TABLE),
    (r"(keys|values)(\.\d+)?$", (P("data", "tensor"),)),  # [B, K, S, H]
    (r"_BT$", (P(ROWS),)),  # of training
    (r"_B\w*$", (P("data"),)),  # of decoding
)
_STACKED = re.compile(r"(^|\.)(layers\.\D|(keys|values)$)")


def adapter_paths(path: str) -> list[str]:
    """Paths of A and B beside a kernel (lora.py); empty for another parameter."""
    if not path.endswith("kernel"):
        return []
    return [path.removesuffix("kernel") + adapter for adapter in ("adapter.a", "adapter.b")]


def stacked_path(path: str) -> str:
    """The path of a parameter in the same model with stacked layers."""
    return re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.", path)


def tensors_of(path: str, names: Names) -> list[tuple[str, int | slice | None]]:
    """Name and slot of each tensor of a parameter ("layers.3.attention.qkv.kernel") in files."""
    layer = re.match(r"layers\.(\d+)\.", path)
    prefix = _LAYER[names].format(layer[1]) if layer else ""
    kind = "bias" if path.endswith("bias") else "weight"
    tensors = _BY_PATH[stacked_path(path)].tensors
    return [(f"{prefix}{getattr(tensor, names)}.{kind}", tensor.slot) for tensor in tensors]


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None
) -> NamedSharding | None:
    """Sharding of the array with this path, "layers.0.norm.scale"; None without a mesh."""
    if mesh is None:
        return None
    choices = _choices(stacked_path(path))
    if _STACKED.search(path):
        choices = [P(None, *choice) for choice in choices]
    whole = (choice for choice in choices if fitted(choice, shape, mesh) == choice)
    return NamedSharding(mesh, next(whole, fitted(choices[-1], shape, mesh)))


def _choices(path: str) -> tuple[P, ...]:
    kernel = re.sub(r"adapter\.[ab]$", "kernel", path)
    for parameter in PARAMETERS:
        if f".{kernel}".endswith(f".{parameter.path}"):
            if kernel == path:
                return parameter.sharding
            # Adapters [I, R] and [R, *O] have the axes of their kernel.
            inputs, *outputs = parameter.sharding[0]
            return (P(inputs),) if path.endswith("a") else (P(None, *outputs),)
    return next((choices for regex, choices in _ARRAYS if re.search(regex, path)), (P(),))


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` of every leaf of a model, a training state or the like."""

    def named(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return function(name.removesuffix(".value"), leaf)

    return jax.tree_util.tree_map_with_path(named, tree)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their path, in the tree's order."""
    leaves: dict[str, Any] = {}
    map_named(leaves.__setitem__, tree)
    return leaves


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`sharding_of` every leaf of a model, a decode state or the like."""
    return map_named(lambda path, leaf: sharding_of(path, leaf.shape, mesh), tree)


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with every array sharded over the mesh; unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def placed_shapes(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes of the tree's arrays, with their shardings on a mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(tree, mesh),
    )
