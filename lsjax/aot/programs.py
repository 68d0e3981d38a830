"""Lowers the programs of a run from shapes alone, compiles them for devices that need not be
present, and reports their costs.

Figures are JSON objects. Seconds are lower bounds per device.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered, Wrapped
from jax.typing import DTypeLike

from lsjax.aot.chips import GIB, Chip
from lsjax.aot.costs import AMOUNTS, CostAnalysis, ProgramCosts, Trips
from lsjax.aot.hlo import attention_kernel, parse
from lsjax.config import Checked, Kernels, LlamaConfig, TrainConfig, bounded, check
from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.engine import cache_slots
from lsjax.decoding.programs import PROMPT_CHUNKS, ROUNDS, Programs, chunk_size, decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.rounds import BRANCH, DRAFT
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Autoregressive, Strategy
from lsjax.model.attention import LARGE, LARGE_BLOCKS, SMALL, SMALL_BLOCKS
from lsjax.model.llama import Llama
from lsjax.model.parameters import placed_shapes, sharding_of
from lsjax.platforms import with_kernels
from lsjax.sharding import context_shards
from lsjax.training.early_exit import exit_counts
from lsjax.training.loss import CHUNKS, EXITS, loss_chunk
from lsjax.training.step import abstract_state, check_rows, make_train_step

# Name of the conditional around the draft's head in compiled programs.
DRAFT_HEAD = rf"/{DRAFT}/while/body/cond$"


@dataclass(frozen=True)
class DecodingShape(Checked, prefix="--decoding."):
    """Rows to decode: greedy, with prompts of one length."""

    batch_size: int = bounded(1, low=1)
    """Number of rows."""
    prompt_tokens: int = bounded(2_048, low=1)
    """Tokens of each prompt, and so in the cache at a round."""
    strategy: Literal["self_speculative", "autoregressive", "auto"] = "self_speculative"
    """A round of autoregressive decoding is one token. auto may draft with the exit, or with the
    one at half of the layers."""
    exit_layer: int | None = None
    """Exit that drafts; a quarter of the layers by default."""
    num_draft_tokens: int = 4
    """Tokens drafted per round."""

    def chosen(self, model: LlamaConfig) -> Strategy:
        """The strategy. Raises ConfigError if it does not fit the model."""
        if self.strategy == "autoregressive":
            return Autoregressive()
        exit_layer = self.exit_layer or max(1, model.num_layers // 4)
        strategy = SelfSpeculative(exit_layer, self.num_draft_tokens)
        if self.strategy == "auto":
            strategy = Adaptive(tuple(sorted({exit_layer, model.num_layers // 2})))
        strategy.validate(model)
        return strategy


def train_step(config: TrainConfig, mesh: Mesh) -> tuple[Lowered, Trips]:
    """The step of train.py and the trips of its loops. Every position is labelled, and the number
    of enabled exits is the run's average."""
    check_rows(config, mesh)
    state, batch = abstract_state(config, mesh), _batch(config, mesh)
    rows = config.batch_size // config.micro_batches
    with jax.set_mesh(mesh), with_kernels(config.kernels):
        lowered = make_train_step(config).lower(state, batch)
        pieces, steps = rows * context_shards(), config.seq_len // context_shards()
        chunk = loss_chunk(pieces, steps, config.model.vocab_size)
    exits = exit_counts(config.early_exit, config.model.num_layers, config.num_steps).mean()
    learned = math.ceil(steps * config.early_exit.token_share)
    return lowered, {
        rf"/{EXITS}/while$": float(exits),
        rf"/{EXITS}/.*/{CHUNKS}/while$": math.ceil(learned / chunk),
        rf"/{CHUNKS}/while$": math.ceil(steps / chunk),
    }


def evaluation(config: TrainConfig, mesh: Mesh, score: Wrapped) -> tuple[Lowered, Trips]:
    """The program with which train.py scores every exit on a batch; score: `exit_sums` of
    lsjax/evaluation. The program states the trips of all its loops."""
    check_rows(config, mesh)
    model, batch = abstract_state(config, mesh).model, _batch(config, mesh)
    names = ("dtype", "micro_batches", "attention", "kernels")
    with jax.set_mesh(mesh):
        return score.lower(model, batch, **{name: getattr(config, name) for name in names}), {}


def decoding(
    name: Literal["prefill", "decode"],
    config: LlamaConfig,
    shape: DecodingShape,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    kernels: Kernels = "auto",
) -> tuple[Lowered, Trips]:
    """The prefill of a prompt in decode.py, or its decoding loop, which counts as one round.
    kernels: as in `StepConfig`.

    Raises ConfigError for a prompt longer than the model's context.
    """
    prompt, most = shape.prompt_tokens, config.max_context
    check(
        prompt < most,
        f"--decoding.prompt-tokens {prompt} is beyond the model's context of {most}: choose fewer",
    )
    strategy, rows = shape.chosen(config), 1 if name == "prefill" else shape.batch_size
    capacity = cache_slots(prompt + 1, strategy)
    requests = [Request(prompt=[0] * prompt)] * rows
    sizes = dict(capacity=capacity, num_layers=config.num_layers, dtype=dtype)
    state = jax.eval_shape(
        lambda: DecodeState.create(config, requests, learned=strategy.first_guess(rows), **sizes)
    )
    model = jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    model, state = placed_shapes(model, mesh), placed_shapes(state, mesh)
    programs = Programs(model, mesh, kernels=kernels)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    if name == "prefill":
        size = chunk_size(prompt, capacity)
        read = partial(prefill, chunk=size, depth=config.num_layers)
        lengths = [min(end, prompt) for end in range(size, prompt + size, size)]
        trips = {rf"/{PROMPT_CHUNKS}/while$": len(lengths), **cache_blocks(lengths, capacity)}
        return programs.lower(read, state, number), trips
    arguments = placed_shapes(jax.eval_shape(strategy.arguments, model), mesh)
    loop, drafts = partial(decode, strategy=strategy), shape.num_draft_tokens
    trips = {
        rf"/{ROUNDS}/while$": 1,
        rf"/{DRAFT}/while$": 1 + drafts,
        rf"/{BRANCH}/while$": 1,
        DRAFT_HEAD: drafts / (1 + drafts),  # the last trip skips the head
        **cache_blocks([prompt], capacity),
    }
    return programs.lower(loop, state, number, arguments), trips


def round_reads(config: LlamaConfig, shape: DecodingShape, mesh: Mesh) -> tuple[float, float]:
    """Bytes of weights and of used cache, in bfloat16, that each device must read in a round. In
    autoregressive decoding, a round is one token."""
    passes, heads, strategy = config.num_layers, 1, shape.chosen(config)
    if isinstance(strategy, SelfSpeculative):
        # The draft runs its layers once more than it has tokens, and the head once per token. The
        # verification runs the other layers and the head once.
        passes += strategy.num_draft_tokens * strategy.exit_layer
        heads += strategy.num_draft_tokens
    weights = 2 * (passes * config.layer_params + heads * config.head_params)
    slots = (shape.batch_size, config.num_kv_heads, shape.prompt_tokens, config.head_dim)
    own = sharding_of("keys.0", slots, mesh).shard_shape(slots)
    return weights / mesh.shape["tensor"], 2 * 2 * passes * math.prod(own)


def cache_blocks(lengths: list[int], capacity: int) -> Trips:
    """Average number of cache blocks for these used lengths (`cached_attention`)."""
    large = [(length + LARGE // 2) // LARGE if capacity >= LARGE else 0 for length in lengths]
    pairs = zip(lengths, large, strict=True)
    small = [max(0, math.ceil(length / SMALL) - n * (LARGE // SMALL)) for length, n in pairs]
    blocks = {LARGE_BLOCKS: large, SMALL_BLOCKS: small}
    return {rf"/{name}/while$": statistics.fmean(counts) for name, counts in blocks.items()}


def program_report(
    name: str,
    lowered: Lowered,
    trips: Trips,
    chip: Chip,
    mesh: Mapping[str, int],
    reads: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Compiles a program, which may take minutes, and returns its figures.

    reads: bytes of weights and of cache that a round must read, if the program loops over rounds.
    The costs are then those of one round.
    """
    memory = too_large = of_round = None
    costs = ProgramCosts()
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        too_large = " ".join(str(error).split())[:400]
    else:
        memory = memory_figures(partial(getattr, compiled.memory_analysis()), chip)
        if memory["total"] > chip.hbm:  # the GPU compiler accepts programs of any size
            too_large = f"{name} needs {memory['total'] / GIB:.1f} GiB of {chip.hbm / GIB:.1f}"
        analysis = CostAnalysis(parse(compiled.as_text()), mesh, trips, chip)
        if reads is None:
            costs = analysis.program()
        else:
            costs = analysis.loop(ROUNDS)
            weights, cache = (number / chip.hbm_bandwidth for number in reads)
            of_round = dict(weights_seconds=weights, cache_seconds=cache)
    found = {"name": name, "too_large": too_large, "memory": memory, "round": of_round}
    return found | cost_figures(costs, chip)


def memory_figures(found: Callable[[str], int], chip: Chip) -> dict[str, int]:
    """Bytes on each device. found: returns a size by its name in the compiler's analysis."""
    names = dict(arguments="argument", outputs="output", temporaries="temp", code="generated_code")
    sizes = {name: found(f"{word}_size_in_bytes") for name, word in names.items()}
    shared = found("alias_size_in_bytes")  # outputs that share the memory of arguments
    return {**sizes, "aliased": shared, "total": sum(sizes.values()) - shared, "hbm": chip.hbm}


def cost_figures(costs: ProgramCosts, chip: Chip) -> dict[str, Any]:
    """Costs of one run. Its time is the longest of computation and communication within slices and
    between them: a lower bound that assumes full overlap and that all links are busy."""
    within, between = costs.sent_bytes(between=False), costs.sent_bytes(between=True)
    sent_seconds = within / chip.link_bandwidth
    between_seconds = between / chip.slice_bandwidth if between else 0.0
    largest_first = sorted(costs.collectives.items(), key=lambda item: -item[0].sent * item[1])
    return {
        "attention": attention_kernel(costs.kernels),
        **{name: costs.amounts[name] for name in AMOUNTS},
        "sent_bytes": within,
        "sent_seconds": sent_seconds,
        "between_bytes": between,
        "between_seconds": between_seconds,
        "seconds": max(costs.amounts["compute_seconds"], sent_seconds, between_seconds),
        "kernels": dict(costs.kernels),
        "unknown_loops": sorted(costs.unknown_loops),
        "collectives": [one._asdict() | {"count": count} for one, count in largest_first],
    }


def _batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    names = ("tokens_BT", "labels_BT", "segments_BT", "positions_BT")
    return placed_shapes({name: shape for name in names}, mesh)
