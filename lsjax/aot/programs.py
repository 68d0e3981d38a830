"""The programs of a run, lowered from shapes alone: for devices that need not be there."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered, Wrapped
from jax.typing import DTypeLike

from lsjax.aot.costs import Trips
from lsjax.config import LlamaConfig, TrainConfig, check
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.engine import cache_slots
from lsjax.decoding.programs import PROMPT_CHUNKS, ROUNDS, Programs, chunk_size, decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import DRAFT, SelfSpeculative
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.attention import LARGE, LARGE_BLOCKS, SMALL, SMALL_BLOCKS
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed_shapes
from lsjax.training.early_exit import mean_exits
from lsjax.training.loss import CHUNKS, EXITS, loss_chunk
from lsjax.training.start import abstract_state, check_rows
from lsjax.training.step import make_train_step

# What the conditional around the draft's head is called in compiled programs.
DRAFT_HEAD = rf"/{DRAFT}/while/body/cond$"


@dataclass(frozen=True)
class DecodingShape:
    """What is decoded: greedy rows of one length."""

    batch_size: int = 1
    """Rows."""
    prompt_tokens: int = 2_048
    """Tokens of each prompt; their number is also what a round finds in the cache."""
    new_tokens: int = 256
    """New tokens of each row."""
    strategy: Literal["self_speculative", "autoregressive"] = "self_speculative"
    """Decoding strategy; a round of autoregressive decoding is one token."""
    exit_layer: int | None = None
    """Exit that drafts; a quarter of the layers by default."""
    num_draft_tokens: int = 4
    """Drafts a round."""

    def chosen(self, model: LlamaConfig) -> Strategy:
        """The strategy. Raises ConfigError where it does not fit the model."""
        if self.strategy == "autoregressive":
            return Autoregressive()
        exit_layer = self.exit_layer or max(1, model.num_layers // 4)
        strategy = SelfSpeculative(exit_layer, self.num_draft_tokens)
        strategy.validate(model)
        return strategy


class RoundReads(NamedTuple):
    """Bytes that each device has to read in a round of decoding, however it is compiled."""

    weights: int  # of the layers and heads that the round passes, each as often as it does
    cache: int  # of the slots in use, likewise
    layer_passes: int


def train_step(config: TrainConfig, mesh: Mesh) -> tuple[Lowered, Trips]:
    """The step of train.py and the trips of its loops: every position is labelled, and as many
    exits are on as on average over the run."""
    check_rows(config, mesh)
    state, batch = abstract_state(config, mesh), _batch(config, mesh)
    rows = config.batch_size // config.micro_batches
    with jax.set_mesh(mesh):
        lowered = make_train_step(config).lower(state, batch)
        chunk = loss_chunk(rows, config.seq_len, config.model.vocab_size)
    exits = mean_exits(config.early_exit, config.model.num_layers, config.num_steps)
    learned = math.ceil(config.seq_len * config.early_exit.token_share)
    return lowered, {
        rf"/{EXITS}/while$": exits,
        rf"/{EXITS}/.*/{CHUNKS}/while$": math.ceil(learned / chunk),
        rf"/{CHUNKS}/while$": math.ceil(config.seq_len / chunk),
    }


def evaluation(config: TrainConfig, mesh: Mesh, score: Wrapped) -> tuple[Lowered, Trips]:
    """How train.py scores every exit on a batch; the program says the trips of all its loops.

    score: `exit_sums` of lsjax/evaluation.
    """
    check_rows(config, mesh)
    model, batch = abstract_state(config, mesh).model, _batch(config, mesh)
    rest = dict(micro_batches=config.micro_batches, attention=config.attention)
    with jax.set_mesh(mesh):
        lowered = score.lower(model, batch, dtype=config.dtype, **rest)
    return lowered, {}


def decoding(
    name: Literal["prefill", "decode"],
    config: LlamaConfig,
    shape: DecodingShape,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Lowered, Trips]:
    """How decode.py reads a prompt, or its loop; a round of the loop counts, not the loop.

    Raises ConfigError for lengths beyond the model's context.
    """
    prompt, new = shape.prompt_tokens, shape.new_tokens
    check(
        prompt + new <= config.max_context,
        f"{prompt} tokens and {new} new ones are beyond the model's context of "
        f"{config.max_context}: choose fewer",
    )
    strategy, rows = shape.chosen(config), 1 if name == "prefill" else shape.batch_size
    capacity = cache_slots(prompt + 1, strategy)
    state = jax.eval_shape(
        lambda: DecodeState.create(
            config,
            [Request(prompt=[0] * prompt, max_new_tokens=new)] * rows,
            capacity=capacity,
            num_layers=config.num_layers,
            dtype=dtype,
        )
    )
    model, state = _model(config, mesh, dtype), placed_shapes(state, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    if name == "prefill":
        size = chunk_size(prompt, capacity)
        read = partial(prefill, chunk=size, depth=config.num_layers)
        lengths = [min(end, prompt) for end in range(size, prompt + size, size)]
        trips = {rf"/{PROMPT_CHUNKS}/while$": len(lengths), **cache_blocks(lengths, capacity)}
        return Programs(model, mesh).lower(read, state, number), trips
    arguments = placed_shapes(jax.eval_shape(strategy.arguments, model), mesh)
    loop, drafts = partial(decode, strategy=strategy), shape.num_draft_tokens
    trips = {
        rf"/{ROUNDS}/while$": 1,
        rf"/{DRAFT}/while$": 1 + drafts,
        DRAFT_HEAD: drafts / (1 + drafts),  # the last draft passes no head
        **cache_blocks([prompt], capacity),
    }
    return Programs(model, mesh).lower(loop, state, number, arguments), trips


def round_reads(
    config: LlamaConfig, shape: DecodingShape, mesh: Mesh, dtype: DTypeLike = jnp.bfloat16
) -> RoundReads:
    """What a round has to read; in autoregressive decoding a round is a token."""
    model = _model(config, mesh, dtype)
    cache = jax.eval_shape(lambda: KVCache.create(config, shape.batch_size, 1, dtype, 1))
    passes, heads, strategy = config.num_layers, 1, shape.chosen(config)
    if isinstance(strategy, SelfSpeculative):
        # The draft passes its layers once more than it has tokens, and the head once for each; the
        # verification passes the other layers and the head once.
        passes += strategy.num_draft_tokens * strategy.exit_layer
        heads += strategy.num_draft_tokens
    table = model.embedding if model.head is None else model.head
    weights = passes * _bytes(model.layers[0]) + heads * _bytes(table)
    return RoundReads(
        weights, passes * shape.prompt_tokens * _bytes(placed_shapes(cache, mesh)), passes
    )


def cache_blocks(lengths: list[int], capacity: int) -> Trips:
    """Blocks of the cache that lengths in use need, on average (`cached_attention`)."""
    large = [(length + LARGE // 2) // LARGE if capacity >= LARGE else 0 for length in lengths]
    small = [
        max(0, math.ceil(length / SMALL) - count * (LARGE // SMALL))
        for length, count in zip(lengths, large, strict=True)
    ]
    return {
        rf"/{LARGE_BLOCKS}/while$": sum(large) / len(lengths),
        rf"/{SMALL_BLOCKS}/while$": sum(small) / len(lengths),
    }


def _batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    names = ("tokens_BT", "labels_BT", "segments_BT", "positions_BT")
    return placed_shapes({name: shape for name in names}, mesh)


def _model(config: LlamaConfig, mesh: Mesh, dtype: DTypeLike) -> Llama:
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    return placed_shapes(model, mesh)


def _bytes(tree) -> int:
    """Bytes of a device's share."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
