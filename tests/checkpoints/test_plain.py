"""Names that checkpoints keep."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from lsjax.checkpoints.plain import NAMES, from_named, named_leaves, nested, unnested
from lsjax.config import LlamaConfig
from lsjax.model.llama import Llama, stacked


def shapes(**changes) -> Llama:
    config = LlamaConfig.tiny(**changes)
    return jax.eval_shape(lambda: stacked(Llama(config, rngs=nnx.Rngs(0))))


def test_golden_names():
    """A name on disk never changes; L 4, D 64, F 128, K 2, G 2, H 16, V 258."""
    plain = nested(named_leaves(shapes(attention_bias=True, mlp_bias=True)))
    assert jax.tree.map(lambda leaf: leaf.shape, plain) == {
        "embedding": (258, 64),
        "head": (258, 64),
        "norm": (64,),
        "layers": {
            "attention_norm": (4, 64),
            "qkv": (4, 64, 2, 4, 16),
            "qkv_bias": (4, 2, 4, 16),
            "out": (4, 64, 64),
            "out_bias": (4, 64),
            "feed_forward_norm": (4, 64),
            "gate_up": (4, 64, 2, 128),
            "gate_up_bias": (4, 2, 128),
            "down": (4, 128, 64),
            "down_bias": (4, 64),
        },
    }
    adapters = {
        f"layers.{name}_lora_{part}"
        for name in ("qkv", "out", "gate_up", "down")
        for part in ("a", "b")
    }
    assert set(NAMES.values()) == set(unnested(plain)) | adapters
    assert "head" not in named_leaves(shapes(tie_embeddings=True))


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, attention_bias=True)])
def test_round_trip_of_a_state(changes):
    model = shapes(**changes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = (model, jax.eval_shape(optimizer.init, model), {"step": jnp.int32(3)})
    leaves = named_leaves(state)
    assert "1.1.0.mu.layers.qkv" in leaves and "2.step" in leaves
    again = from_named(dict(reversed(leaves.items())), state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(
        one is other
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True)
    )
    assert unnested(nested(leaves)) == leaves
