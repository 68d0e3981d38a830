"""Llama (Touvron et al., 2023): RMSNorm, rotary grouped-query attention, SwiGLU, one head.

LayerSkip is "run a range of layers", so the model is three pure pieces that everything else
composes: `embed`, `run_layers(lo, hi)` and `unembed` (final norm and head, the same for every
exit). Exit E means that layers 0..E-1 have run; E = L is the whole model.

Letters, here and everywhere: B batch, T query length, S cache slots, L layers, D model width,
F feed-forward width, N heads, K K/V heads, G = N / K, H head size, V vocabulary, E exit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig
from lsjax.model.attention import cached_attention, self_attention
from lsjax.model.cache import KVCache, write_slots
from lsjax.model.rope import rope_angles, rotate
from lsjax.sharding import constrain, on_each_device


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich, 2019), in float32 or wider."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * lax.rsqrt(mean_square + self.eps)).astype(x.dtype) * self.scale[...].astype(
            x.dtype
        )


class Linear(nnx.Module):
    """A matrix [inputs, *outputs], and a bias [*outputs] where the config says so."""

    def __init__(
        self,
        inputs: int,
        outputs: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(std)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, *outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T ..."]:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention.

    Queries, keys and values come from one matrix [D, K, G + 2, H], a K/V head beside the query
    heads that share it: one product instead of three, and it shards along K without a gather.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, k, h = config.hidden_size, config.num_kv_heads, config.head_dim
        self.group = config.num_heads // k
        rest = dict(bias=config.attention_bias, std=config.init_std, dtype=dtype, rngs=rngs)
        self.qkv = Linear(d, (k, self.group + 2, h), **rest)
        self.out = Linear(config.num_heads * h, (d,), **rest)

    def project(
        self, x_BTD: Float[Array, "B T D"], rope: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys, turned to their positions, and values."""
        qkv_BTKPH = self.qkv(x_BTD)
        batch, steps, kv_heads, _, size = qkv_BTKPH.shape
        q = qkv_BTKPH[:, :, :, : self.group].reshape(batch, steps, kv_heads * self.group, size)
        k, v = qkv_BTKPH[:, :, :, self.group], qkv_BTKPH[:, :, :, self.group + 1]
        return rotate(q, *rope), rotate(k, *rope), v

    def merge(self, mixed_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Heads back into the model's width."""
        return self.out(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1))


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up in one matrix [D, 2, F]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        rest = dict(bias=config.mlp_bias, std=config.init_std, dtype=dtype, rngs=rngs)
        self.gate_up = Linear(d, (2, f), **rest)
        self.down = Linear(f, (d,), **rest)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up_BT2F = self.gate_up(x_BTD)
        return self.down(jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1])


class Block(nnx.Module):
    """One transformer layer, f_l in x_{l+1} = x_l + f_l(x_l) of the paper's equation 1."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        segments_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The layer on whole sequences, without a cache; segments do not see one another."""
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rope)
        x_BTD = x_BTD + self.attention.merge(self_attention(q, k, v, segments_BT))
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))

    def extend(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        positions_BT: Int[Array, "B T"],
        keys: Float[Array, "*L B K S H"],
        values: Float[Array, "*L B K S H"],
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "*L B K S H"], Float[Array, "*L B K S H"]]:
        """The layer on T tokens that follow those in the cache; also gives the longer cache.

        layer: which one of a stacked cache it is.
        """
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rope)
        mixed, keys, values = _attend(q, k, v, keys, values, positions_BT, layer)
        x_BTD = constrain(x_BTD + self.attention.merge(mixed), "data")
        x_BTD = constrain(x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), "data")
        return x_BTD, keys, values


def _attend(q, k, v, keys, values, positions_BT, layer):
    """Puts new keys and values into the cache and looks at all of it. On a mesh each device does
    that for its own rows and heads, without communication."""

    def attend(q, k, v, keys, values, positions_BT):
        keys = write_slots(keys, k, positions_BT[:, 0], layer)
        values = write_slots(values, v, positions_BT[:, 0], layer)
        return cached_attention(q, keys, values, positions_BT, layer), keys, values

    new, cache = P("data", None, "tensor"), P("data", "tensor")
    if layer is not None:
        cache = P(None, *cache)
    return on_each_device(
        attend,
        (q, k, v, keys, values, positions_BT),
        (new, new, new, cache, cache, P("data")),
        (new, cache, cache),
    )


class Llama(nnx.Module):
    """A Llama whose layers are separate (`nnx.List` of Block: decoding) or stacked (one Block
    with [L, ...] leaves: training, and decoding of models so deep that a program with every layer
    in it takes too long to compile); `stacked` and `unstacked` turn one form into the other.

    Raises nothing by itself: shapes are checked by `LlamaConfig` and by the loaders.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        init = nnx.initializers.normal(config.init_std)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(init(rngs.params(), table, dtype))
        self.layers = nnx.List(
            Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.head = None if config.tie_embeddings else nnx.Param(init(rngs.params(), table, dtype))

    @property
    def is_stacked(self) -> bool:
        """Whether the layers are one Block with [L, ...] leaves."""
        return isinstance(self.layers, Block)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters."""
        return self.embedding[...].dtype

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings: the input of layer 0."""
        return self.embedding[...][tokens_BT]

    def run_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        lo: int,
        hi: int,
        positions_BT: Int[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Layers lo..hi-1 on T new tokens per row, at consecutive positions, with their cache.

        Stacked layers run in a loop: a small program, which copies each layer's weights.
        """
        rope = rope_angles(positions_BT, self.config, x_BTD.dtype)
        x_BTD = constrain(x_BTD, "data")
        if self.is_stacked:

            def run(layer, carry):
                block = jax.tree.map(
                    lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), self.layers
                )
                x_BTD, keys, values = carry
                return block.extend(x_BTD, rope, positions_BT, keys, values, layer)

            x_BTD, *parts = lax.fori_loop(lo, hi, run, (x_BTD, cache.keys, cache.values))
            return x_BTD, KVCache(*parts)
        keys, values = list(cache.keys), list(cache.values)
        for layer in range(lo, hi):
            x_BTD, keys[layer], values[layer] = self.layers[layer].extend(
                x_BTD, rope, positions_BT, keys[layer], values[layer]
            )
        return x_BTD, KVCache(tuple(keys), tuple(values))

    def exits(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        *,
        read: Callable[[Float[Array, "B T D"]], Any] = lambda x_BTD: x_BTD,
    ) -> Any:
        """What `read` makes of each layer's output on whole sequences, [L, ...]: the outputs
        themselves, [L, B, T, D], by default. Index E - 1 is of what exit E unembeds.

        Rows of several documents come with positions that restart and a segment number for each.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT)
        rope = rope_angles(positions_BT, self.config, x_BTD.dtype)

        def run(x_BTD, block):
            x_BTD = block(x_BTD, rope, segments_BT)
            return x_BTD, read(x_BTD)

        if self.is_stacked:
            return lax.scan(run, x_BTD, self.layers)[1]
        outputs = []
        for block in self.layers:
            x_BTD, output = run(x_BTD, block)
            outputs.append(output)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The head's rows; the embedding where the two are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def unembed(
        self, x: Float[Array, "*batch D"], table_VD: Float[Array, "V D"] | None = None
    ) -> Float[Array, "*batch V"]:
        """Final norm and head, shared by every exit; logits in float32 or wider.

        table_VD: some of the head's rows, for their logits only.
        """
        table_VD = (self.head_table if table_VD is None else table_VD).astype(x.dtype)
        x = self.norm(x)
        rows_RD = x.reshape(-1, x.shape[-1])
        # The table is the left operand: XLA:CPU then runs any number of rows near the speed of
        # memory, on jax 0.10 and 0.12 alike (docs/performance.md).
        logits_VR = jnp.matmul(
            table_VD, rows_RD.T, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
        )
        return logits_VR.T.reshape(*x.shape[:-1], -1)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the whole model."""
        return self.unembed(self.exits(tokens_BT)[-1])


def stacked(model: Llama) -> Llama:
    """The same model with its layers in one Block of [L, ...] leaves, for `lax.scan`."""
    blocks = _separate_blocks(model)
    return _with_layers(model, jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks))


def unstacked(model: Llama) -> Llama:
    """The same model with a Block per layer, for decoding."""
    return _with_layers(model, nnx.List(_separate_blocks(model)))


def _separate_blocks(model: Llama) -> Sequence[Block]:
    if not model.is_stacked:
        return list(model.layers)
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], model.layers)
        for index in range(model.config.num_layers)
    ]


def _with_layers(model: Llama, layers) -> Llama:
    """A Llama that shares every parameter of `model` but its layers."""
    leaves, structure = jax.tree.flatten(model)
    copy = jax.tree.unflatten(structure, leaves)
    copy.layers = layers
    return copy
