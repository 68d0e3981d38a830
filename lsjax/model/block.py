"""A transformer layer: RMSNorm, rotary grouped-query attention, SwiGLU."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import AttentionKernel, LlamaConfig
from lsjax.kernels import rope as rope_kernel
from lsjax.kernels.cached_attention import attend
from lsjax.kernels.matmuls import gradients_first, linear, with_steps
from lsjax.kernels.rope import Rope
from lsjax.kernels.swiglu import swiglu
from lsjax.model.attention import self_attention
from lsjax.model.cached_attention import cached_attention
from lsjax.model.rope import rotate
from lsjax.sharding import constrain, on_each_device

# Names for remat policies. ADAPTED: output of a matrix plus its adapter. HEADS: queries, keys and
# values. MIDDLE: hidden state after attention.
ADAPTED, HEADS, MIDDLE = "adapted", "heads", "middle"


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich, 2019), in float32 or wider, over the scale's axes."""

    def __init__(self, size: int | tuple[int, ...], eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(-self.scale[...].ndim, 0))
        mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
        # The scale is applied in the wide dtype: its gradient is a sum over all tokens.
        return (wide * lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)


def identity(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Stands in for a norm that the model lacks."""
    return x


class Linear(nnx.Module):
    """A matrix [inputs, *outputs], with an optional bias [*outputs] and adapter."""

    def __init__(self, kernel: Float[Array, "I *O"], *, bias: bool):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(kernel.shape[1:], kernel.dtype)) if bias else None
        self.adapter = nnx.data(None)  # or an Adapter (lora.py)

    def __call__(
        self, x: Float[Array, "B T I"], may_recompute: bool = False
    ) -> Float[Array, "B T ..."]:
        """may_recompute: as for `linear`."""
        y = linear(x, self.kernel[...].astype(x.dtype), may_recompute)
        if self.bias is not None:
            # In float32 or wider: the bias's gradient is a sum over all tokens.
            wide = jnp.promote_types(x.dtype, jnp.float32)
            y = (y.astype(wide) + self.bias[...]).astype(x.dtype)
        return y if self.adapter is None else checkpoint_name(y + self.adapter(x), ADAPTED)


class Attention(nnx.Module):
    """Grouped-query self-attention. One matrix [D, K, G + 2, H] stores a K/V head beside its query
    heads. That needs one matmul instead of three, and shards along K without a gather."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, k, size = config.hidden_size, config.num_kv_heads, config.head_dim
        heads, bias = config.num_heads, config.attention_bias
        self.group = heads // k
        normal = nnx.initializers.normal
        reads, writes = normal(config.init_std), normal(config.residual_std)
        qkv = reads(rngs.params(), (width, k, self.group + 2, size), dtype)
        self.qkv = Linear(qkv, bias=bias or config.qkv_bias)
        self.out = Linear(writes(rngs.params(), (heads * size, width), dtype), bias=bias)

        def norm(count: int) -> Callable[[Array], Array]:
            shape = {"none": None, "head": size, "full": (count, size)}[config.qk_norm]
            return RMSNorm(shape, config.norm_eps, dtype) if shape else identity

        self.q_norm, self.k_norm = norm(heads), norm(k)

    def project(
        self, x_BUD: Float[Array, "B U D"], rope: Rope, steps: int
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Rotated queries and keys, and values, of the first T = `steps` of U steps."""
        if isinstance(self.qkv, nnx.List):  # split_matrices
            q, k, v = (matrix(x_BUD) for matrix in self.qkv)
        else:
            qkv_BTKnH = self.qkv(x_BUD)[:, :steps]
            q = qkv_BTKnH[:, :, :, : self.group]
            k, v = qkv_BTKnH[:, :, :, self.group], qkv_BTKnH[:, :, :, self.group + 1]
        q = q.reshape(*q.shape[:2], -1, q.shape[-1])
        q, k = self.q_norm(q), self.k_norm(k)
        return rope_kernel.rotate(q, rope, rotate), rope_kernel.rotate(k, rope, rotate), v


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up in one matrix [D, 2, F]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        normal = nnx.initializers.normal
        reads, writes = normal(config.init_std), normal(config.residual_std)
        self.gate_up = Linear(reads(rngs.params(), (d, 2, f), dtype), bias=bias)
        self.down = Linear(writes(rngs.params(), (f, d), dtype), bias=bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if isinstance(self.gate_up, nnx.List):  # split_matrices
            return self.down(swiglu(tuple(matrix(x_BTD) for matrix in self.gate_up)))
        x_BTF, down = gradients_first(swiglu(self.gate_up(x_BTD)), self.down)
        return down(x_BTF)


class Block(nnx.Module):
    """One transformer layer: f_l in x_{l+1} = x_l + f_l(x_l) of the paper's equation 1. An exit
    block may lack the feed-forward part."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        feed_forward: bool = True,
    ):
        norms = [RMSNorm(config.hidden_size, config.norm_eps, dtype) for _ in range(2)]
        none = [identity] * 2
        before, after = (none, norms) if config.norm_after else (norms, none)
        self.attention_norm, self.attention_post_norm = before[0], after[0]
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        own = dict(dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, **own) if feed_forward else None
        if feed_forward:
            self.feed_forward_norm, self.feed_forward_post_norm = before[1], after[1]

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        segments_BT: Int[Array, "B T"] | None = None,
        kernel: AttentionKernel = "auto",
        keep_B: Bool[Array, " B"] | None = None,
        window: int | None = None,
    ) -> Float[Array, "B T D"]:
        """The layer on whole sequences, without a cache; segments do not see one another. kernel:
        attention kernel (attention.py). keep_B: M of equation 1, all rows by default; other rows
        stay unchanged. window: as in LayerKind."""

        def kept(y_BTD):
            return y_BTD if keep_B is None else keep_B.astype(y_BTD.dtype)[:, None, None] * y_BTD

        heads = self.attention.project(self.attention_norm(x_BTD), rope, x_BTD.shape[1])
        heads = checkpoint_name(heads, HEADS)
        mixed = self_attention(*heads, segments_BT, kernel, window)
        y_BTD = self.attention.out(mixed.reshape(*mixed.shape[:2], -1), may_recompute=True)
        x_BTD = checkpoint_name(x_BTD + kept(self.attention_post_norm(y_BTD)), MIDDLE)
        return x_BTD if self.feed_forward is None else x_BTD + kept(self._feed_forward(x_BTD))

    # Layers of the same form are traced once. `inline` leaves the compiled program as it is.
    @partial(jax.jit, static_argnames="window", inline=True)
    def extend(
        self,
        x_BUD: Float[Array, "B U D"],
        rope: Rope,
        positions_BT: Int[Array, "B T"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        window: int | None = None,
    ) -> tuple[Float[Array, "B U D"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """The layer on T tokens that follow those in the cache; also returns the longer cache.
        x_BUD: U steps; those after the T tokens are padding (`enough_steps`)."""
        q, k, v = self.attention.project(self.attention_norm(x_BUD), rope, positions_BT.shape[1])
        new, cache = P("data", None, "tensor"), P("data", "tensor")
        arguments = q, k, v, keys, values, positions_BT
        specs, outputs = (new, new, new, cache, cache, P("data")), (new, cache, cache)
        mixed, keys, values = on_each_device(partial(_attend, window), arguments, specs, outputs)
        mixed = with_steps(mixed, x_BUD.shape[1])
        y_BUD = self.attention.out(mixed.reshape(*mixed.shape[:2], -1))
        x_BUD = constrain(x_BUD + self.attention_post_norm(y_BUD), "data")
        if self.feed_forward is not None:
            x_BUD = constrain(x_BUD + self._feed_forward(x_BUD), "data")
        return x_BUD, keys, values

    def _feed_forward(self, x: Float[Array, "B U D"]) -> Float[Array, "B U D"]:
        return self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(x)))


def _attend(window, *arrays):
    """Attends to a device's rows and heads of the cache, with the new keys and values in it."""
    return attend(*arrays, window, reference=cached_attention)
