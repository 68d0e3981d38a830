"""The table of what lies where. tests/long/eight_devices has what devices do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

from lsjax.config import LlamaConfig
from lsjax.decoding.draft import DraftArguments
from lsjax.decoding.draft_vocabulary import DraftHead
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.model.parameters import sharding_of, shardings
from lsjax.sharding import constrain, fitted, on_each_device

CONFIG = LlamaConfig.tiny(num_layers=2, attention_bias=True, mlp_bias=True)  # K 2, V 258, D 64
# On data 2, fsdp 2, tensor 2 all sizes divide.
ALL_DIVIDE = {
    "embedding": P("tensor", "fsdp"),
    "head": P("tensor", "fsdp"),
    "norm.scale": P(),
    "layers.1.attention_norm.scale": P(),
    "layers.1.attention.qkv.kernel": P("fsdp", "tensor"),
    "layers.1.attention.qkv.bias": P("tensor"),
    "layers.1.attention.out.kernel": P("tensor", "fsdp"),
    "layers.1.attention.out.bias": P(),
    "layers.1.feed_forward.gate_up.kernel": P("fsdp", None, "tensor"),
    "layers.1.feed_forward.gate_up.bias": P(None, "tensor"),
    "layers.1.feed_forward.down.kernel": P("tensor", "fsdp"),
    "layers.1.feed_forward.down.bias": P(),
}
# On tensor 8 neither the K/V heads nor the vocabulary do.
SECOND_CHOICE = {
    "embedding": P(None, ("fsdp", "tensor")),
    "layers.1.attention.qkv.kernel": P(("fsdp", "tensor")),
    "layers.1.attention.qkv.bias": P(None),
    "layers.1.attention.out.kernel": P("tensor", "fsdp"),
    "layers.1.feed_forward.gate_up.kernel": P("fsdp", None, "tensor"),
}


def specs(form, **sizes) -> dict[str, P]:
    names = ("data", "fsdp", "tensor")
    mesh = AbstractMesh(
        tuple(sizes.get(name, 1) for name in names), names, axis_types=(AxisType.Auto,) * 3
    )
    model = jax.eval_shape(lambda: form(Llama(CONFIG, rngs=nnx.Rngs(0))))
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(shardings(model, mesh))
    }


def test_every_parameter_has_its_place():
    found = specs(unstacked, data=2, fsdp=2, tensor=2)
    for name, spec in ALL_DIVIDE.items():
        assert found.pop(name) == spec, name
    assert all(name.startswith("layers.0.") or "feed_forward_norm" in name for name in found)


def test_sizes_that_do_not_divide():
    found = specs(unstacked, tensor=8)
    for name, spec in SECOND_CHOICE.items():
        assert found[name] == spec, name
    nowhere = specs(unstacked, fsdp=7, tensor=5)
    assert all(names is None for spec in nowhere.values() for names in spec)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(tensor=8)])
def test_stacked_layers_have_one_axis_more(sizes):
    separate, together = specs(unstacked, **sizes), specs(stacked, **sizes)
    for name, spec in separate.items():
        if name.startswith("layers.1."):
            assert together[name.replace("layers.1.", "layers.")] == P(None, *spec)
        elif not name.startswith("layers."):
            assert together[name] == spec


@pytest.mark.parametrize(
    "shape, spec, expected",
    [
        ((8, 3), P(("data", "fsdp"), "tensor"), P(("data", "fsdp"), None)),
        ((6, 4), P(("data", "fsdp"), "tensor"), P("data", "tensor")),
        ((3, 4), P(("data", "fsdp")), P(None)),
        ((8,), P("fsdp"), P("fsdp")),
    ],
)
def test_axes_that_do_not_divide_are_left_out(shape, spec, expected):
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert fitted(spec, shape, mesh) == expected


def test_nothing_happens_without_a_mesh():
    x = jnp.ones((4, 3))
    assert constrain(x, "data", "tensor") is x
    assert on_each_device(lambda x: x, (x,), (P("data"),), P("data")) is x


def test_the_head_of_a_draft_vocabulary_is_sharded():
    """As the model's own head; other arrays of the arguments are on every device."""
    names = ("data", "fsdp", "tensor")
    mesh = AbstractMesh((1, 1, 4), names, axis_types=(AxisType.Auto,) * 3)
    arguments = DraftArguments(DraftHead(*(np.zeros(shape) for shape in (8, 16, (8, 4)))))
    places = shardings(arguments, mesh)
    assert places.head.rows.spec == sharding_of("head", (8, 4), mesh).spec != P()
    assert places.head.ids_W.spec == places.head.places_V.spec == P()
