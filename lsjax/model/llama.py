"""Llama (Touvron et al., 2023): RMSNorm, rotary grouped-query attention, SwiGLU, one head.

LayerSkip runs ranges of layers. So the model has three pure pieces that everything else composes:
`embed`, `run_layers(lo, hi)` and `unembed` (final norm and head, the same for every exit). Exit E
means that layers 0..E-1 have run; E = L is the full model.

docs/method.md has a table of the letters in names and shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.config import AttentionKernel, LlamaConfig
from lsjax.kernels.matmuls import enough_steps, with_table
from lsjax.kernels.rope import Rope
from lsjax.model.block import Block, RMSNorm
from lsjax.model.cache import KVCache
from lsjax.model.int8 import Int8Rows
from lsjax.model.rope import rope_angles
from lsjax.sharding import ROWS, constrain, in_context_order


class Llama(nnx.Module):
    """A Llama whose layers are separate (`nnx.List` of Block: decoding) or stacked (one Block
    with [L, ...] leaves: training); `stacked` and `unstacked` convert between the forms."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        init = nnx.initializers.normal(config.init_std)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(init(rngs.params(), table, dtype))
        layers = range(config.num_layers)
        self.layers = nnx.List(Block(config, dtype=dtype, rngs=rngs) for _ in layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.exit_blocks = nnx.Dict()  # by exit, such as "8" (exit_blocks.py)
        self.head = None if config.tie_embeddings else nnx.Param(init(rngs.params(), table, dtype))

    @property
    def is_stacked(self) -> bool:
        """Whether the layers are one Block with [L, ...] leaves."""
        return isinstance(self.layers, Block)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        """Most tokens of a text."""
        return self.config.max_context

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters, which may be shapes."""
        return jax.tree.leaves(self.embedding)[0].dtype

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of the layers' matrices (`cast_matrices`) and of the hidden states. Matrices of
        integers (int8.py) are widened to that of the parameters."""
        block = self.layers if self.is_stacked else self.layers[0]
        dtype = block.attention.out.kernel[...].dtype
        return dtype if jnp.issubdtype(dtype, jnp.floating) else self.dtype

    def new_cache(self, batch: int, capacity: int, depth: int) -> KVCache:
        """An empty cache of the first `depth` layers, with `capacity` slots for each row."""
        return KVCache.create(self.config, batch, capacity, self.dtype, depth, self.exit_blocks)

    def for_decoding(self) -> "Llama":
        """The same model with a Block per layer."""
        return unstacked(self)

    def bytes_per_token(self) -> int:
        """Bytes of weights that a token of all layers reads: an embedding is one row."""
        config = self.config
        count = config.num_layers * config.layer_params + config.head_params
        itemsize = 1 if isinstance(self.head, Int8Rows) else self.dtype.itemsize
        return count * itemsize

    def prepare(self, positions_BT: Int[Array, "B T"]) -> Mapping[str, Rope]:
        """Angles of the positions, for `run_layers`."""
        return rope_angles(positions_BT, self.config, self.compute_dtype)

    @jax.named_scope("embedding")
    def embed(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Token embeddings: the input of layer 0. Their gradient is summed in the table's dtype.
        Positions are not embedded: layers rotate by them."""
        return self.embedding[...][tokens_BT].astype(self.compute_dtype)

    def embed_sharded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings of whole sequences, sharded over a mesh by rows. Each device looks up
        its columns for the rows of its data shard. Then an all-to-all redistributes by row."""
        x_BTD = self.embed(constrain(tokens_BT, "data", "context"))
        return constrain(constrain(x_BTD, "data", "context", "fsdp"), ROWS, "context")

    @jax.named_scope("layers")
    def run_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        lo: int,
        hi: int,
        positions_BT: Int[Array, "B T"],
        cache: KVCache,
        prepared: Mapping[str, Rope] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs unstacked layers lo..hi-1 on T new tokens per row, updating their cache. Positions
        are consecutive. prepared: by `prepare`, if it is known."""
        ropes = prepared or rope_angles(positions_BT, self.config, x_BTD.dtype)
        steps = x_BTD.shape[1]
        x_BTD = constrain(enough_steps(x_BTD), "data")
        keys, values = list(cache.keys), list(cache.values)
        for layer in range(lo, hi):
            rope, window = self.config.layer_kind(layer)
            x_BTD, keys[layer], values[layer] = self.layers[layer].extend(
                x_BTD, ropes[rope], positions_BT, keys[layer], values[layer], window
            )
        return x_BTD[:, :steps], replace(cache, keys=tuple(keys), values=tuple(values))

    @property
    def draft_state(self) -> Callable | None:
        """What the protocol asks for: an exit with a block drafts from the block's output. None
        without any block."""
        return self._through_block if len(self.exit_blocks) else None

    @jax.named_scope("exit_block")
    def _through_block(self, exit_layer, x_BTD, positions_BT, cache):
        name, steps = str(exit_layer), x_BTD.shape[1]
        if name not in self.exit_blocks:
            return x_BTD, cache
        rope, window = self.config.layer_kind(exit_layer)
        x_BTD, keys, values = self.exit_blocks[name].extend(
            constrain(enough_steps(x_BTD), "data"),
            rope_angles(positions_BT, self.config, x_BTD.dtype)[rope],
            positions_BT,
            cache.block_keys[name],
            cache.block_values[name],
            window,
        )
        keys, values = cache.block_keys | {name: keys}, cache.block_values | {name: values}
        return x_BTD[:, :steps], replace(cache, block_keys=keys, block_values=values)

    def exits(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        *,
        kernel: AttentionKernel = "auto",
        read: Callable[[Float[Array, "B T D"]], Any] = lambda x_BTD: x_BTD,
    ) -> Any:
        """`read` of each layer's output, stacked as [L, ...]. Index E - 1 belongs to exit E.

        In packed rows, positions restart at each document, and each document has its own segment
        number. kernel: as in `self_attention`. On a mesh with a context axis, the columns are
        `in_context_order`.
        """
        if positions_BT is None:
            positions_T = in_context_order(np.arange(tokens_BT.shape[1])[None])
            positions_BT = jnp.broadcast_to(positions_T, tokens_BT.shape)
        x_BTD = self.embed_sharded(tokens_BT)
        ropes = rope_angles(positions_BT, self.config, x_BTD.dtype)

        def run(block, x_BTD, _, kind):
            return block(x_BTD, ropes[kind.rope], segments_BT, kernel, window=kind.window)

        return self.scan_layers(x_BTD, run, lambda _, __, y_BTD, ___: (None, read(y_BTD)))[2]

    @jax.named_scope("layers")
    def scan_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        run: Callable,
        collect: Callable,
        carry: Any = None,
        inputs_L: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Runs all layers on whole sequences. Returns the model's output, the final carry, and
        `collect`'s second result stacked over layers.

        run: (block, x_BTD, inputs, LayerKind) -> the layer's output y_BTD. collect: (carry, x_BTD,
        y_BTD, inputs) -> (carry, anything). inputs_L: per-layer inputs, for stacked layers only.
        Layers of different kinds that repeat are one step of the scan.
        """

        def layer(before, block_and_inputs, index=0):
            (x_BTD, carry), (block, inputs) = before, block_and_inputs
            y_BTD = run(block, x_BTD, inputs, self.config.layer_kind(index))
            y_BTD = constrain(y_BTD, ROWS, "context")
            carry, seen = collect(carry, x_BTD, y_BTD, inputs)
            return (y_BTD, carry), seen

        def several(before, layers):
            found = []
            for index, one in enumerate(layers):
                before, seen = layer(before, one, index)
                found.append(seen)
            return before, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        def one_period(before, layers):
            return several(before, (jax.tree.map(itemgetter(at), layers) for at in range(period)))

        before, layers, period = (x_BTD, carry), (self.layers, inputs_L), self.config.layer_period
        if not self.is_stacked:
            after, seen_L = several(before, ((block, None) for block in self.layers))
        elif period == 1:
            after, seen_L = lax.scan(layer, before, layers)
        else:
            layers = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), layers)
            after, seen_L = lax.scan(one_period, before, layers)
            seen_L = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen_L)
        return *after, seen_L

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The head's rows; the embedding if the two are tied."""
        if isinstance(self.head, Int8Rows):
            return self.head.table()
        return (self.embedding if self.head is None else self.head)[...]

    def head_rows(self, ids_W: ArrayLike) -> Float[Array, "W D"] | Int8Rows:
        """The head's rows of some tokens, for `unembed`."""
        if isinstance(self.head, Int8Rows):
            return self.head.take(ids_W)
        return self.head_table[ids_W]

    @jax.named_scope("head")
    def unembed(
        self, x: Float[Array, "*batch D"], rows: Float[Array, "W D"] | Int8Rows | None = None
    ) -> Float[Array, "*batch W"]:
        """Final norm and head, shared by every exit; logits in float32 or wider. rows: a subset of
        the head's rows; only their logits are computed."""
        if rows is None:
            rows = self.head if isinstance(self.head, Int8Rows) else self.head_table
        is_rounded = isinstance(rows, Int8Rows)
        table_WD = (rows.rows[...] if is_rounded else rows).astype(x.dtype)
        logits_RW = with_table(self.norm(x).reshape(-1, x.shape[-1]), table_WD)
        if is_rounded:
            logits_RW = logits_RW * rows.scale[...]
        return logits_RW.reshape(*x.shape[:-1], -1)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the full model."""
        return self.unembed(self.exits(tokens_BT)[-1])


def stacked(model: Llama) -> Llama:
    """The same model with its layers in one Block of [L, ...] leaves, for `lax.scan`."""
    if model.is_stacked:
        return model
    return with_parts(model, layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.layers))


def unstacked(model: Llama) -> Llama:
    """The same model with a Block per layer, for decoding."""
    if not model.is_stacked:
        return model
    blocks = [jax.tree.map(itemgetter(at), model.layers) for at in range(model.config.num_layers)]
    return with_parts(model, layers=nnx.List(blocks))


def with_parts(module: Any, **parts: Any) -> Any:
    """A copy of a module that replaces these parts and shares the rest."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy
