"""Table of parameters: path in a Llama, sharding, and names in files.

Import, export, saved runs and sharding read the table. A new parameter needs one more line. Paths
are those of stacked layers ("layers.attention.qkv.kernel"). Paths of separate layers also have a
number ("layers.3.attention.qkv.kernel").
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from lsjax.sharding import ROWS, fitted

Names = Literal["huggingface", "gguf"]


class Parameter(NamedTuple):
    """One parameter, or the same parameter of every layer. huggingface, gguf: its tensors in files,
    without layer and ".weight" or ".bias"; several of them are its `SLOTS`. sharding: candidate
    mesh axes for each array axis; the first candidate that divides is used."""

    path: str
    huggingface: str
    gguf: str
    sharding: tuple[P, ...] = (P(),)


# Matrices of several tensors in files, and the index of each in the second-to-last axis. A K/V head
# has its G queries, its key and its value.
SLOTS = {"qkv": (slice(None, -2), -2, -1), "gate_up": (0, 1)}

_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_q attn_k attn_v"
_OUT = "self_attn.o_proj", "attn_output"
_GATE_UP = "mlp.gate_proj mlp.up_proj", "ffn_gate ffn_up"
_DOWN = "mlp.down_proj", "ffn_down"
# Sharded along V, a lookup needs an all-reduce of [B, T, D]; unembedding needs none.
_TABLE = (P("tensor", "fsdp"), P(None, ("fsdp", "tensor")))

PARAMETERS = (
    Parameter("embedding", "model.embed_tokens", "token_embd", _TABLE),
    Parameter("layers.attention_norm.scale", "input_layernorm", "attn_norm"),
    # [D, K, G + 2, H]; sharded along D if the mesh does not divide the K/V heads.
    Parameter("layers.attention.qkv.kernel", *_QKV, (P("fsdp", "tensor"), P(("fsdp", "tensor")))),
    Parameter("layers.attention.qkv.bias", *_QKV, (P("tensor"),)),
    Parameter("layers.attention.out.kernel", *_OUT, (P("tensor", "fsdp"),)),  # [N * H, D]
    Parameter("layers.attention.out.bias", *_OUT),
    # [H], or [N, H] and [K, H]
    Parameter("layers.attention.q_norm.scale", "self_attn.q_norm", "attn_q_norm"),
    Parameter("layers.attention.k_norm.scale", "self_attn.k_norm", "attn_k_norm"),
    Parameter(
        "layers.attention_post_norm.scale", "post_attention_layernorm", "post_attention_norm"
    ),
    Parameter("layers.feed_forward_norm.scale", "post_attention_layernorm", "ffn_norm"),
    Parameter("layers.feed_forward_post_norm.scale", "post_feedforward_layernorm", "post_ffw_norm"),
    # [D, 2, F]
    Parameter("layers.feed_forward.gate_up.kernel", *_GATE_UP, (P("fsdp", None, "tensor"),)),
    Parameter("layers.feed_forward.gate_up.bias", *_GATE_UP, (P(None, "tensor"),)),
    Parameter("layers.feed_forward.down.kernel", *_DOWN, (P("tensor", "fsdp"),)),  # [F, D]
    Parameter("layers.feed_forward.down.bias", *_DOWN),
    Parameter("norm.scale", "model.norm", "output_norm"),
    Parameter("head", "lm_head", "output", _TABLE),
)
_BY_PATH = {parameter.path: parameter for parameter in PARAMETERS}
_LAYER = {"huggingface": "model.layers.{}.", "gguf": "blk.{}."}
# Caches, states and batches, by the end of their path; array names contain their axes.
_ARRAYS = (
    (r"(^|\.)head\.rows(\.rows)?$", _TABLE),  # of DraftHead, and of int8 rows
    (r"(keys|values)\.\d+$", (P("data", "tensor"),)),  # [B, K, S, H]
    (r"(^|\.)cache\.", (P("data"),)),  # of other models, [B, ...]
    (r"_BT$", (P(ROWS),)),  # of training
    (r"_B\w*$", (P("data"),)),  # of decoding
)


def adapter_paths(path: str) -> list[str]:
    """Paths of A and B of a kernel (lora.py); empty for other parameters."""
    names = ("adapter.a", "adapter.b") if path.endswith("kernel") else ()
    return [path.removesuffix("kernel") + name for name in names]


def stacked_path(path: str) -> str:
    """The path of a parameter in the same model with stacked layers. Exit blocks are layers too."""
    return re.sub(r"(^|\.)(layers|exit_blocks)\.\d+\.", r"\1layers.", path)


def tensors_of(path: str, names: Names) -> list[tuple[str, int | slice | None]]:
    """Name and slot of each tensor of a parameter ("layers.3.attention.qkv.kernel") in files; slot
    None if the tensor is the complete parameter."""
    layer = re.match(r"layers\.(\d+)\.", path)
    prefix = _LAYER[names].format(layer[1]) if layer else ""
    kind = "bias" if path.endswith("bias") else "weight"
    rounded = re.fullmatch(r"(.*kernel)_scale|(head)\.(rows|scale)", path)  # int8.py
    if rounded:
        kind = "weight" if rounded[3] == "rows" else "weight_scale"
        path = rounded[1] or rounded[2]
    tensors = getattr(_BY_PATH[stacked_path(path)], names).split()
    slots = next((slots for matrix, slots in SLOTS.items() if f".{matrix}." in path), (None,))
    return [(f"{prefix}{name}.{kind}", slot) for name, slot in zip(tensors, slots, strict=True)]


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh | None
) -> NamedSharding | None:
    """Sharding of the array with this path, "layers.0.norm.scale"; None without a mesh."""
    if mesh is None:
        return None
    choices = _choices(stacked_path(path))
    if re.search(r"(^|\.)layers\.\D", path):
        choices = [P(None, *choice) for choice in choices]
    whole = (choice for choice in choices if fitted(choice, shape, mesh) == choice)
    return NamedSharding(mesh, next(whole, fitted(choices[-1], shape, mesh)))


def _choices(path: str) -> tuple[P, ...]:
    kernel = re.sub(r"adapter\.[ab]$", "kernel", path)
    found = (one.sharding for one in PARAMETERS if f".{kernel}".endswith(f".{one.path}"))
    others = (choices for regex, choices in _ARRAYS if re.search(regex, path))
    choices = next(found, None) or next(others, (P(),))
    if kernel == path:
        return choices
    # Adapters [I, r] and [r, *O] have the axes of their kernel.
    inputs, *outputs = choices[0]
    return (P(inputs),) if path.endswith("a") else (P(None, *outputs),)


def map_named(
    function: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Applies `function(path, leaf)` to every leaf of a model, training state or similar tree.
    is_leaf: modules that are leaves too."""

    def named(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return function(name.removesuffix(".value"), leaf)

    return jax.tree_util.tree_map_with_path(named, tree, is_leaf=is_leaf)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order."""
    leaves: dict[str, Any] = {}
    map_named(leaves.__setitem__, tree)
    return leaves


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`sharding_of` every leaf of a model, decode state or similar tree."""
    return map_named(lambda path, leaf: sharding_of(path, leaf.shape, mesh), tree)


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with every array on devices, sharded over a mesh if there is one."""
    return jax.device_put(tree, None if mesh is None else shardings(tree, mesh))


def placed_shapes(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Shapes of the tree's arrays, with their shardings on a mesh."""

    def shape(path, leaf):
        place = sharding_of(path, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return map_named(shape, tree)
