"""One transformer layer: RMSNorm, rotary grouped-query attention, SwiGLU.

Letters as in llama.py.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import AttentionKernel, LlamaConfig
from lsjax.model.attention import cached_attention, nvidia_capability, self_attention
from lsjax.model.cache import write_slots
from lsjax.model.products import gradients_first, linear, split_swiglu, swiglu, with_steps
from lsjax.model.rope import rotate
from lsjax.sharding import constrain, on_each_device, platform

# Name of the sum of a matrix's and its adapter's outputs, for remat policies: it replaces both.
ADAPTED = "adapted"


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich, 2019), in float32 or wider."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        # The scale too: its gradient is a sum over all tokens.
        return (wide * lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)


class Linear(nnx.Module):
    """A matrix [inputs, *outputs], and if asked for a bias [*outputs] and an adapter."""

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
        self.adapter = nnx.data(None)  # or an Adapter (lora.py)

    def __call__(self, x: Float[Array, "B T I"], again: bool = False) -> Float[Array, "B T ..."]:
        """again: as for `linear`."""
        y = linear(x, self.kernel[...].astype(x.dtype), again)
        if self.bias is not None:
            # In float32 or wider: the bias's gradient is a sum over all tokens.
            wide = jnp.promote_types(x.dtype, jnp.float32)
            y = (y.astype(wide) + self.bias[...]).astype(x.dtype)
        if self.adapter is None:
            return y
        return checkpoint_name(y + self.adapter(x), ADAPTED)


class Attention(nnx.Module):
    """Grouped-query self-attention.

    Queries, keys and values come from one matrix [D, K, G + 2, H], a K/V head beside the query
    heads that share it: one product instead of three, and it shards along K without a gather.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, k, h = config.hidden_size, config.num_kv_heads, config.head_dim
        self.group = config.num_heads // k
        rest = dict(bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.qkv = Linear(d, (k, self.group + 2, h), std=config.init_std, **rest)
        self.out = Linear(config.num_heads * h, (d,), std=config.residual_std, **rest)

    def project(
        self, x_BUD: Float[Array, "B U D"], rope: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys, turned to their positions, and values, of the first T of U steps."""
        if isinstance(self.qkv, nnx.List):  # split_matrices
            q, k, v = (matrix(x_BUD) for matrix in self.qkv)
        else:
            qkv_BTKPH = self.qkv(x_BUD)[:, : rope[0].shape[1]]
            q = qkv_BTKPH[:, :, :, : self.group]
            k, v = qkv_BTKPH[:, :, :, self.group], qkv_BTKPH[:, :, :, self.group + 1]
        q = q.reshape(*q.shape[:2], -1, q.shape[-1])
        return rotate(q, *rope), rotate(k, *rope), v

    def merge(
        self, mixed_BTNH: Float[Array, "B T N H"], again: bool = False
    ) -> Float[Array, "B T D"]:
        """Heads back into the model's width; again: as for `linear`."""
        return self.out(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1), again)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up in one matrix [D, 2, F]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        rest = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_up = Linear(d, (2, f), std=config.init_std, **rest)
        self.down = Linear(f, (d,), std=config.residual_std, **rest)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if isinstance(self.gate_up, nnx.List):  # split_matrices
            gate, up = (matrix(x_BTD) for matrix in self.gate_up)
            return self.down(split_swiglu(gate, up))
        x_BTF, down = gradients_first(swiglu(self.gate_up(x_BTD)), self.down)
        return down(x_BTF)


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
        kernel: AttentionKernel = "auto",
        keep_B: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The layer on whole sequences, without a cache; segments do not see one another.

        kernel: of the attention (attention.py). keep_B: M of equation 1, all rows by default.
        The others stay as they are: both branches add 0 to them.
        """

        def kept(y_BTD):
            return y_BTD if keep_B is None else keep_B.astype(y_BTD.dtype)[:, None, None] * y_BTD

        q, k, v = self.attention.project(self.attention_norm(x_BTD), rope)
        mixed = self_attention(q, k, v, segments_BT, kernel)
        # On GPUs remat keeps the output of attention instead of this product of it: as large, and
        # dearer to compute again for long sequences.
        x_BTD = x_BTD + kept(self.attention.merge(mixed, again=platform() == "gpu"))
        return x_BTD + kept(self.feed_forward(self.feed_forward_norm(x_BTD)))

    def extend(
        self,
        x_BUD: Float[Array, "B U D"],
        rope: tuple[Array, Array],
        positions_BT: Int[Array, "B T"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
    ) -> tuple[Float[Array, "B U D"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """The layer on T tokens that follow those in the cache; also gives the longer cache.

        x_BUD: U steps; those behind the T tokens are padding (`enough_steps`).
        """
        q, k, v = self.attention.project(self.attention_norm(x_BUD), rope)
        mixed, keys, values = _attend(q, k, v, keys, values, positions_BT)
        mixed = with_steps(mixed, x_BUD.shape[1])
        x_BUD = constrain(x_BUD + self.attention.merge(mixed), "data")
        x_BUD = constrain(x_BUD + self.feed_forward(self.feed_forward_norm(x_BUD)), "data")
        return x_BUD, keys, values


def _attend(q, k, v, keys, values, positions_BT):
    """Writes new keys and values to the cache and attends to all of it; on a mesh each device for
    its own rows and heads."""

    def attend(q, k, v, keys, values, positions_BT):
        if nvidia_capability() >= 8:
            from lsjax.model import flash_decoding as flash  # here, as Pallas is slow to import

            if flash.fits(q, keys):
                return flash.flash_decoding(q, k, v, keys, values, positions_BT[:, 0])
        keys = write_slots(keys, k, positions_BT[:, 0])
        values = write_slots(values, v, positions_BT[:, 0])
        return cached_attention(q, keys, values, positions_BT), keys, values

    new, cache = P("data", None, "tensor"), P("data", "tensor")
    return on_each_device(
        attend,
        (q, k, v, keys, values, positions_BT),
        (new, new, new, cache, cache, P("data")),
        (new, cache, cache),
    )
