"""Lowers decode.py's programs from shapes alone: the prefill of a prompt, and rounds of decoding.

A program of `auto` has rounds of several kinds. Each kind is counted by itself.
"""

import math
import statistics
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax.stages import Lowered
from jax.typing import DTypeLike

from lsjax.aot.chips import Chip
from lsjax.aot.costs import Trips
from lsjax.config import DecodingShape, Kernels, LlamaConfig, check
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.compiler import Programs
from lsjax.decoding.programs import decode, prefill
from lsjax.decoding.prompts import chunk_size
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import cache_slots
from lsjax.decoding.scopes import (
    DRAFT,
    PROMPT_CHUNKS,
    ROUNDS,
    VERIFY,
    guard_of_exit,
    guard_of_layers,
    guard_of_length,
)
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Autoregressive, Strategy
from lsjax.kernels.cache_blocks import LARGE, LARGE_BLOCKS, SMALL, SMALL_BLOCKS
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.llama import Llama
from lsjax.model.matrices import with_int8
from lsjax.model.parameters import placed_shapes, sharding_of

# Names of the conditionals around the draft's head and around auto's scores.
DRAFT_HEAD = rf"/{DRAFT}/while/body/cond$"
SCORES = rf"/{VERIFY}/(\w+/while/body/)?cond$"


class Round(NamedTuple):
    """A kind of round: the exit that drafts, and its number of drafts. (0, 0) drafts nothing."""

    exit_layer: int
    num_draft_tokens: int


def chosen_strategy(shape: DecodingShape, model: LlamaConfig) -> Strategy:
    """The strategy. Raises ConfigError if it does not fit the model."""
    if shape.strategy == "autoregressive":
        return Autoregressive()
    strategy = SelfSpeculative(shape.exit_of(model), shape.num_draft_tokens)
    if shape.strategy == "auto":
        strategy = Adaptive(tuple(sorted({shape.exit_of(model), model.num_layers // 2})))
        drafts, most = shape.num_draft_tokens, strategy.lengths[-1]
        check(
            1 <= drafts <= most,
            f"--decoding.num-draft-tokens {drafts} must be in 1..{most} for auto",
        )
    strategy.validate(model)
    return strategy


def kinds_of_rounds(shape: DecodingShape, model: LlamaConfig) -> list[Round]:
    """The kinds of rounds to report."""
    without, drafting = Round(0, 0), Round(shape.exit_of(model), shape.num_draft_tokens)
    kinds = dict(autoregressive=[without], self_speculative=[drafting])
    return kinds.get(shape.strategy, [without, drafting])


def prefill_program(
    config: LlamaConfig,
    shape: DecodingShape,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    kernels: Kernels = "auto",
) -> tuple[Lowered, Trips]:
    """The prefill of a prompt in decode.py. kernels: as in `StepConfig`.

    Raises ConfigError for a prompt longer than the model's context.
    """
    programs, state = _shapes(config, shape, 1, mesh, dtype, kernels)
    prompt, capacity = shape.prompt_tokens, state.tokens_BS.shape[1]
    size = chunk_size(prompt, capacity)
    exits = chosen_strategy(shape, config).exits if shape.exit_blocks else ()
    read = partial(prefill, chunk=size, depth=config.num_layers, exits=exits)
    lengths = [min(end, prompt) for end in range(size, prompt + size, size)]
    trips = {rf"/{PROMPT_CHUNKS}/while$": len(lengths), **cache_blocks(lengths, capacity)}
    return programs.lower(read, state, _number(mesh)), trips


def decode_program(
    config: LlamaConfig,
    shape: DecodingShape,
    rows: int,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    kernels: Kernels = "auto",
) -> Lowered:
    """The loop of rounds in decode.py. kernels: as in `StepConfig`.

    Raises ConfigError for a prompt longer than the model's context.
    """
    strategy = chosen_strategy(shape, config)
    programs, state = _shapes(config, shape, rows, mesh, dtype, kernels)
    arguments = placed_shapes(jax.eval_shape(strategy.arguments, programs.model), mesh)
    return programs.lower(partial(decode, strategy=strategy), state, _number(mesh), arguments)


def _shapes(
    config: LlamaConfig,
    shape: DecodingShape,
    rows: int,
    mesh: Mesh,
    dtype: DTypeLike,
    kernels: Kernels,
) -> tuple[Programs, DecodeState]:
    """The programs of a model of shapes, and the shapes of a state with these rows."""
    prompt, most = shape.prompt_tokens, config.max_context
    check(
        prompt < most,
        f"--decoding.prompt-tokens {prompt} is beyond the model's context of {most}: choose fewer",
    )
    strategy = chosen_strategy(shape, config)
    capacity = cache_slots(prompt + 1, strategy)
    requests = [Request(prompt=[0] * prompt)] * rows

    def build() -> Llama:
        model = Llama(config, rngs=nnx.Rngs(0), dtype=dtype)
        model = with_exit_blocks(model, strategy.exits) if shape.exit_blocks else model
        return with_int8(model) if shape.weights == "int8" else model

    model = jax.eval_shape(build)

    def create(model):
        cache = model.new_cache(rows, capacity, config.num_layers)
        learned = strategy.first_guess(rows)
        return DecodeState.create(requests, cache=cache, capacity=capacity, learned=learned)

    state = jax.eval_shape(create, model)
    programs = Programs(placed_shapes(model, mesh), mesh, kernels=kernels)
    return programs, placed_shapes(state, mesh)


def _number(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))


def round_trips(config: LlamaConfig, shape: DecodingShape, kind: Round) -> Trips:
    """Trips of the loops in `decode_program`, and shares of its conditionals, in one round."""
    strategy, (exit_layer, drafts) = chosen_strategy(shape, config), kind
    trips = {
        rf"/{ROUNDS}/while$": 1,
        rf"/{DRAFT}/while$": 1 + drafts if exit_layer else 0,
        DRAFT_HEAD: drafts / (1 + drafts),  # the last trip skips the head
        **cache_blocks([shape.prompt_tokens], cache_slots(shape.prompt_tokens + 1, strategy)),
    }
    if strategy.exits:
        verified = next(length for length in strategy.lengths if length >= drafts)
        for length in strategy.lengths:
            trips[rf"/{guard_of_length(length)}/while$"] = int(length == verified)
        for lo, hi in pairwise((0, *strategy.exits)):
            layers = guard_of_layers(lo, hi)
            trips[rf"/{DRAFT}/while/body/{layers}/while$"] = int(hi <= exit_layer)
            trips[rf"/{VERIFY}/(.*/)?{layers}/while$"] = int(exit_layer <= lo)
        for own in strategy.exits:
            trips[rf"/{guard_of_exit(own)}/while$"] = int(own == exit_layer)
    if isinstance(strategy, Adaptive):
        model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        trips[SCORES] = 1 / strategy.scored_every(model)
    return trips


def round_reads(
    config: LlamaConfig, shape: DecodingShape, rows: int, kind: Round, mesh: Mesh
) -> tuple[float, float]:
    """Bytes of weights and of used cache that each device must read in a round. What is not int8 is
    bfloat16."""
    # The draft runs its layers once more than it has tokens, and the head once per token. The
    # verification runs the other layers and the head once. An exit block is one more layer.
    passes = config.num_layers + kind.num_draft_tokens * kind.exit_layer
    if shape.exit_blocks and kind.exit_layer:
        passes += 1 + kind.num_draft_tokens
    heads = 1 + kind.num_draft_tokens
    itemsize = 1 if shape.weights == "int8" else 2
    weights = itemsize * (passes * config.layer_params + heads * config.head_params)
    slots = (rows, config.num_kv_heads, shape.prompt_tokens, config.head_dim)
    own = sharding_of("keys.0", slots, mesh).shard_shape(slots)
    return weights / mesh.shape["tensor"], 2 * 2 * passes * math.prod(own)


def round_figures(
    config: LlamaConfig, shape: DecodingShape, rows: int, kind: Round, mesh: Mesh, chip: Chip
) -> dict[str, Any]:
    """A kind of round, and the least time for its reads."""
    weights, cache = round_reads(config, shape, rows, kind, mesh)
    return {
        "rows": rows,
        **kind._asdict(),
        "weights_seconds": weights / chip.hbm_bandwidth,
        "cache_seconds": cache / chip.hbm_bandwidth,
    }


def cache_blocks(lengths: list[int], capacity: int) -> Trips:
    """Average number of cache blocks for these used lengths (`cached_attention`)."""
    large = [(length + LARGE // 2) // LARGE if capacity >= LARGE else 0 for length in lengths]
    pairs = zip(lengths, large, strict=True)
    small = [max(0, math.ceil(length / SMALL) - n * (LARGE // SMALL)) for length, n in pairs]
    blocks = {LARGE_BLOCKS: large, SMALL_BLOCKS: small}
    return {rf"/{name}/while$": statistics.fmean(counts) for name, counts in blocks.items()}
