"""A model, or the state of a training run, as plain dicts under names that checkpoints keep.

What is on disk does not depend on how the modules of a Llama are built:

    {"embedding": [V, D], "norm": [D], "head": [V, D], "layers": {"qkv": [L, D, K, G + 2, H], ...}}

A module that is built in another way changes `NAMES`, and old checkpoints still load. Arrays that
an optimizer keeps in the shape of a Llama have the same names.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax

from lsjax.model.llama import Llama

# Path in a stacked Llama -> name in a checkpoint; a dot stands for a dict in a dict.
NAMES = {
    "embedding": "embedding",
    "norm.scale": "norm",
    "head": "head",
    "layers.attention_norm.scale": "layers.attention_norm",
    "layers.attention.qkv.kernel": "layers.qkv",
    "layers.attention.qkv.bias": "layers.qkv_bias",
    "layers.attention.out.kernel": "layers.out",
    "layers.attention.out.bias": "layers.out_bias",
    "layers.feed_forward_norm.scale": "layers.feed_forward_norm",
    "layers.feed_forward.gate_up.kernel": "layers.gate_up",
    "layers.feed_forward.gate_up.bias": "layers.gate_up_bias",
    "layers.feed_forward.down.kernel": "layers.down",
    "layers.feed_forward.down.bias": "layers.down_bias",
}
NAMES |= {
    path.replace("kernel", f"adapter.{part}"): f"{name}_lora_{part}"
    for path, name in NAMES.items()
    if path.endswith("kernel")
    for part in ("a", "b")
}


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, those of a Llama in it (with stacked layers) by `NAMES`."""
    found: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_llama):
        if _is_llama(node):
            for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
                found[_joined(_path(path), NAMES[_path(inner).removesuffix(".value")])] = leaf
        else:
            found[_path(path)] = node
    return found


def from_named(leaves: Mapping[str, Any], like: Any) -> Any:
    """The tree whose `named_leaves` these are; `like` is one with the same structure."""
    names = list(named_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Named leaves as dicts in dicts."""
    plain: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = name.split(".")
        inside = plain
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = leaf
    return plain


def unnested(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts in dicts as named leaves."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}


def name_of(path: str) -> tuple[str, int | None]:
    """Name in a checkpoint of a Llama's parameter ("layers.3.attention.qkv.kernel", or
    "layers.attention.qkv.kernel" where layers are stacked), and the number of its layer."""
    layer = re.match(r"layers\.(\d+)\.", path)
    if layer is None:
        return NAMES[path], None
    return NAMES["layers." + path[layer.end() :]], int(layer[1])


def _is_llama(node: Any) -> bool:
    return isinstance(node, Llama)


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
