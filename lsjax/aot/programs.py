"""The programs of a run, lowered from shapes alone: for devices that need not be there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from lsjax.aot.costs import Trips
from lsjax.config import LlamaConfig, TrainConfig, check
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.batching import STOP_IDS
from lsjax.decoding.engine import cache_slots
from lsjax.decoding.programs import PROMPT_CHUNKS, ROUNDS, Programs, chunk_size, decode, prefill
from lsjax.decoding.sampling import GREEDY
from lsjax.decoding.self_speculative import DRAFT, SelfSpeculative
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.evaluation.exits import exit_sums
from lsjax.model.attention import LARGE, LARGE_BLOCKS, SMALL, SMALL_BLOCKS
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed_shapes
from lsjax.training.early_exit import mean_exits
from lsjax.training.loss import CHUNKS, EXITS, loss_chunk
from lsjax.training.start import abstract_state, check_rows
from lsjax.training.step import TrainState, make_train_step

# What the conditional around the draft's head is called in compiled programs.
DRAFT_HEAD = f"{DRAFT}/while/body/cond"


@dataclass(frozen=True)
class Decoding:
    """What is decoded: greedy rows of one length."""

    batch_size: int = 1
    """Rows."""
    prompt_tokens: int = 2_048
    """Of each row; their number is also what a round finds in the cache."""
    new_tokens: int = 256
    """Of each row."""
    strategy: Literal["self_speculative", "autoregressive"] = "self_speculative"
    """How; a round of autoregressive decoding is one token."""
    exit_layer: int | None = None
    """Exit that drafts; a quarter of the layers by default."""
    num_draft_tokens: int = 4
    """Drafts a round."""

    def chosen(self, model: LlamaConfig) -> Strategy:
        """The strategy. Raises ConfigError where it does not fit the model."""
        if self.strategy == "autoregressive":
            return Autoregressive()
        strategy = SelfSpeculative(self._exit(model), self.num_draft_tokens)
        strategy.validate(model)
        return strategy

    def passes(self, model: LlamaConfig) -> tuple[int, int]:
        """How often a round passes a layer, and the head."""
        if self.strategy == "autoregressive":
            return model.num_layers, 1
        again = self.num_draft_tokens * self._exit(model)
        return model.num_layers + again, 1 + self.num_draft_tokens

    def _exit(self, model: LlamaConfig) -> int:
        return self.exit_layer or max(1, model.num_layers // 4)


def train_step(config: TrainConfig, mesh: Mesh) -> tuple[Lowered, Trips]:
    """The step of train.py and the trips of its loops: every position is labelled, and as many
    exits are on as on average over the run."""
    state, batch = _state_and_batch(config, mesh)
    rows = config.batch_size // config.micro_batches
    with jax.set_mesh(mesh):
        lowered = make_train_step(config).lower(state, batch)
        chunk = loss_chunk(rows, config.seq_len, config.model.vocab_size)
    exits = mean_exits(config.early_exit, config.model.num_layers, config.num_steps)
    share = math.ceil(config.seq_len * config.early_exit.token_share)

    def trips(op_name: str) -> float | None:
        learned = share if EXITS in op_name else config.seq_len
        return {EXITS: exits, CHUNKS: math.ceil(learned / chunk)}.get(_loop(op_name))

    return lowered, trips


def evaluation(config: TrainConfig, mesh: Mesh) -> tuple[Lowered, Trips]:
    """How train.py scores every exit on a batch; the program says the trips of all its loops."""
    state, batch = _state_and_batch(config, mesh)
    with jax.set_mesh(mesh):
        lowered = exit_sums.lower(
            state.model,
            batch,
            dtype=config.dtype,
            micro_batches=config.micro_batches,
            attention=config.attention,
        )
    return lowered, lambda op_name: None


def _state_and_batch(config: TrainConfig, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """Shapes of what a step takes. Not to be called within the mesh: there jax makes small
    constants on devices that must exist."""
    check_rows(config, mesh)
    shape = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    names = ("tokens_BT", "labels_BT", "segments_BT", "positions_BT")
    return abstract_state(config, mesh), placed_shapes({name: shape for name in names}, mesh)


def decoding(
    config: LlamaConfig, asked: Decoding, mesh: Mesh, dtype=jnp.bfloat16
) -> Mapping[str, tuple[Lowered, Trips]]:
    """How decode.py reads a prompt, and its loop; a round of the loop counts, not the loop.

    Raises ConfigError for lengths beyond the model's context.
    """
    total = asked.prompt_tokens + asked.new_tokens
    check(
        total <= config.max_context,
        f"{asked.prompt_tokens} tokens and {asked.new_tokens} new ones are beyond the model's "
        f"context of {config.max_context}: choose fewer",
    )
    strategy = asked.chosen(config)
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    capacity = cache_slots(asked.prompt_tokens + 1, strategy)

    def rows(count: int) -> DecodeState:
        state = jax.eval_shape(
            lambda: DecodeState.create(
                config,
                [[0] * asked.prompt_tokens] * count,
                [asked.new_tokens] * count,
                [[-1] * STOP_IDS] * count,
                capacity=capacity,
                num_layers=config.num_layers,
                dtype=dtype,
                sampling=[GREEDY] * count,
            )
        )
        return placed_shapes(state, mesh)

    model = placed_shapes(model, mesh)
    arguments = placed_shapes(jax.eval_shape(strategy.arguments, model), mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    programs = Programs(model, mesh)
    size = chunk_size(asked.prompt_tokens, capacity)
    read = partial(prefill, chunk=size, depth=config.num_layers)
    loop = partial(decode, strategy=strategy)
    chunks = math.ceil(asked.prompt_tokens / size)
    lengths = [min((chunk + 1) * size, asked.prompt_tokens) for chunk in range(chunks)]
    return {
        "prefill": (
            programs.lower(read, rows(1), number),
            _decoding_trips({PROMPT_CHUNKS: chunks}, lengths, capacity),
        ),
        "decode": (
            programs.lower(loop, rows(asked.batch_size), number, arguments),
            _decoding_trips(
                {
                    ROUNDS: 1,
                    DRAFT: 1 + asked.num_draft_tokens,
                    # The last draft passes no head.
                    DRAFT_HEAD: asked.num_draft_tokens / (1 + asked.num_draft_tokens),
                },
                [asked.prompt_tokens],
                capacity,
            ),
        ),
    }


def _decoding_trips(known: Mapping[str, float], lengths: list[int], capacity: int) -> Trips:
    """Blocks of the cache that lengths in use need, on average (`cached_attention`)."""
    large = [(length + LARGE // 2) // LARGE if capacity >= LARGE else 0 for length in lengths]
    small = [
        max(0, math.ceil(length / SMALL) - count * (LARGE // SMALL))
        for length, count in zip(lengths, large, strict=True)
    ]
    blocks = {
        LARGE_BLOCKS: sum(large) / len(lengths),
        SMALL_BLOCKS: sum(small) / len(lengths),
    }
    return lambda op_name: (known | blocks).get(_loop(op_name))


def _loop(op_name: str) -> str:
    """The name of the scope that a loop is in, jit(step)/.../NAME/while, or DRAFT_HEAD."""
    if op_name.endswith(f"/{DRAFT_HEAD}"):
        return DRAFT_HEAD
    return op_name.removesuffix("/while").rpartition("/")[2]
