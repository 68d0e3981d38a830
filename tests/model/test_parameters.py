"""The table of parameters: complete, one name for each tensor, and names that saved runs keep."""

import jax
import optax
import pytest
from flax import nnx

from lsjax.config import LlamaConfig, LoraConfig
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import with_adapters
from lsjax.model.parameters import (
    PARAMETERS,
    adapter_paths,
    named_leaves,
    stacked_path,
    tensors_of,
)


def shapes(**changes) -> Llama:
    config = LlamaConfig.tiny(**changes)
    return jax.eval_shape(lambda: stacked(Llama(config, rngs=nnx.Rngs(0))))


def test_golden_paths():
    """Saved runs have these names; L 4, D 64, F 128, K 2, G 2, H 16, V 258.

    Where one changes, raise VERSION in lsjax/config/checked.py.
    """
    leaves = named_leaves(shapes(attention_bias=True, mlp_bias=True))
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "embedding": (258, 64),
        "head": (258, 64),
        "norm.scale": (64,),
        "layers.attention_norm.scale": (4, 64),
        "layers.attention.qkv.kernel": (4, 64, 2, 4, 16),
        "layers.attention.qkv.bias": (4, 2, 4, 16),
        "layers.attention.out.kernel": (4, 64, 64),
        "layers.attention.out.bias": (4, 64),
        "layers.feed_forward_norm.scale": (4, 64),
        "layers.feed_forward.gate_up.kernel": (4, 64, 2, 128),
        "layers.feed_forward.gate_up.bias": (4, 2, 128),
        "layers.feed_forward.down.kernel": (4, 128, 64),
        "layers.feed_forward.down.bias": (4, 64),
    }
    families = named_leaves(shapes(qk_norm="full", norm_after=True))
    assert {name: leaf.shape for name, leaf in families.items() if name not in leaves} == {
        "layers.attention.q_norm.scale": (4, 4, 16),
        "layers.attention.k_norm.scale": (4, 2, 16),
        "layers.attention_post_norm.scale": (4, 64),
        "layers.feed_forward_post_norm.scale": (4, 64),
    }
    assert named_leaves(shapes(qk_norm="head"))["layers.attention.k_norm.scale"].shape == (4, 16)
    assert {parameter.path for parameter in PARAMETERS} == {*leaves, *families}
    assert "head" not in named_leaves(shapes(tie_embeddings=True))


def test_adapters_lie_beside_their_kernels():
    config = LoraConfig(rank=2)
    model = jax.eval_shape(
        lambda: with_adapters(stacked(Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0))), config, 0)
    )
    kernels = [f"layers.{name}.kernel" for name in ("attention.qkv", "feed_forward.down")]
    for kernel in kernels:
        assert set(adapter_paths(kernel)) <= set(named_leaves(model))
    assert adapter_paths(kernels[0])[1] == "layers.attention.qkv.adapter.b"


@pytest.mark.parametrize("names", ["huggingface", "gguf"])
def test_every_tensor_has_a_name_of_its_own(names):
    """In each model: norms precede attention and feed-forward, or follow them."""
    for norm_after, count in ((False, 21), (True, 21)):
        model = shapes(attention_bias=True, mlp_bias=True, qk_norm="head", norm_after=norm_after)
        found = [name for path in named_leaves(model) for name, _ in tensors_of(path, names)]
        assert len(found) == len(set(found)) == count


def test_names_of_a_tensor():
    path = "layers.12.attention.qkv.bias"
    assert tensors_of(path, "huggingface")[1] == ("model.layers.12.self_attn.k_proj.bias", -2)
    assert tensors_of(path, "gguf")[0] == ("blk.12.attn_q.bias", slice(None, -2))
    assert tensors_of("norm.scale", "gguf") == [("output_norm.weight", None)]
    assert stacked_path(path) == "layers.attention.qkv.bias"
    assert stacked_path("model." + path) == "model.layers.attention.qkv.bias"


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, attention_bias=True)])
def test_paths_of_a_state(changes):
    model = shapes(**changes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = (model, jax.eval_shape(optimizer.init, model), {"step": jax.eval_shape(int)})
    leaves = named_leaves(state)
    assert "1.1.0.mu.layers.attention.qkv.kernel" in leaves and "2.step" in leaves
    again = jax.tree.unflatten(jax.tree.structure(state), leaves.values())
    assert all(
        one is other
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True)
    )
