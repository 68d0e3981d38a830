"""Stage a: every strategy gives the same tokens as autoregressive decoding. Stages b and b8: the
speed of 1B and 8B shapes if every draft is accepted.

Models have random weights, or the same with an identity tail, whose drafts are all accepted. Texts
are compared in float32 and bfloat16. In float32, a margin between the two best logits that is wider
than rounding explains is a failure. In bfloat16, the margins are only recorded.

The limit of a round is the bytes of weights and of used cache that it reads, over the memory's
measured bandwidth. The ideal speedup counts only weights (lsjax/decoding/cost.py).
"""

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_stages.results import PartResults, card
from flax import nnx

from lsjax.config import LlamaConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import ideal_speedup
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit, Strategy
from lsjax.evaluation.comparison import FLOAT32_MARGIN, first_difference, identity_tail
from lsjax.model.llama import Llama

ROWS = 4  # of a batch: fewer than the prompts, so that rows are refilled
SHAPES = {"1b": LlamaConfig.llama3_2_1b, "8b": LlamaConfig.llama3_8b}


class NoText(Tokenizer):
    """Tokenizer whose texts are empty: prompts are ids, and ids are compared."""

    vocab_size, eos_ids, special_spelling, _pieces = 0, (), {}, {}
    _encode_batch = _save_model = None


def random_model(config: LlamaConfig, dtype: str) -> Llama:
    """Random weights, made on the device."""
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))()


def random_prompts(config: LlamaConfig, lengths: Sequence[int]) -> list[list[int]]:
    """A prompt of each length."""
    rng = np.random.default_rng(0)
    return [rng.integers(config.vocab_size, size=length).tolist() for length in lengths]


def memory_bandwidth(num_bytes: int) -> float:
    """Bytes per second of a sum over float32 numbers: the best of seven."""
    x, seconds = jnp.ones((1 << 10, num_bytes >> 12), jnp.float32), []
    total = jax.jit(lambda x: x.sum(1)).lower(x).compile()
    for _ in range(8):
        begin = time.perf_counter()
        jax.block_until_ready(total(x))
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds[1:])


def strategies(config: LlamaConfig, part: str, tiny: bool) -> list[tuple[str, Strategy, int]]:
    """Names, strategies, and batch sizes; for tiny models only a few, because compiling is slow.
    An early exit gives the same tokens only with the identity tail."""
    layers, half = config.num_layers, config.num_layers // 2
    vocabulary = DraftVocabulary(np.arange(config.vocab_size // 4, dtype=np.int32))
    found = [
        ("a quarter of the layers, 4 drafts", SelfSpeculative(max(1, layers // 4), 4), 1),
        ("half, 5 drafts by confidence", SelfSpeculative(half, 5, draft_confidence=0.2), 1),
        (f"half, 4 drafts, {ROWS} rows", SelfSpeculative(half, 4), ROWS),
        (f"autoregressive, {ROWS} rows", Autoregressive(), ROWS),
        ("all but one, 8 drafts", SelfSpeculative(layers - 1, 8), 1),
        ("no drafts", SelfSpeculative(half, 0), 1),
        ("half, 4 drafts of a vocabulary", SelfSpeculative(half, 4, vocabulary), 1),
        ("early exit", EarlyExit(half), 1),
    ]
    return found[: 3 if part == "float32" else 1] if tiny else found


def run_equality(part: str, results: PartResults, tiny: bool) -> None:
    """Stage a in one dtype, the name of the part."""
    if part == "float32":  # accelerators use fewer bits in matmuls by default
        jax.config.update("jax_default_matmul_precision", "highest")
    config = LlamaConfig.tiny(num_layers=2)
    if not tiny:  # an untied head: a tied one repeats the last token
        config = LlamaConfig.llama3_2_1b(num_layers=8, vocab_size=4096, tie_embeddings=False)
    # Lengths with prompt chunks of one size, so that there is one prefill program.
    lengths = [5, 24, 17, 32, 30, 9] if tiny else [300, 410, 290, 520, 333, 700]
    prompts = random_prompts(config, lengths)
    results.start(card(), new_tokens=(new := 12 if tiny else 48), prompts=len(prompts))
    plain, quarter = random_model(config, part), max(1, config.num_layers // 4)
    engines = {rows: Engine(plain, NoText(), batch_size=rows) for rows in (1, ROWS)}

    def texts(model: Llama, strategy: Strategy, rows: int) -> list[Completion]:
        engines[rows].use_model(model)
        engines[rows].use(strategy)
        return engines[rows].generate(prompts, max_new_tokens=new)

    def compared(model: Llama, expected: list[Completion], name: str, *rest: Any) -> dict[str, Any]:
        found = texts(model, *rest)
        pairs = [
            first_difference(model, prompt, one.token_ids, other.token_ids)
            for prompt, one, other in zip(prompts, expected, found, strict=True)
        ]
        differences = [pair for pair in pairs if pair is not None]
        wide = sum(not one.margin <= FLOAT32_MARGIN for one in differences)
        if wide and part == "float32":
            results.fail(name, f"{wide} texts differ by a margin above {FLOAT32_MARGIN:.0e}")
        drafted = sum(one.drafted for one in found)
        return {
            "texts": len(found),
            "differ": len(differences),
            "widest margin": max((float(one.margin) for one in differences), default=None),
            "accepted": sum(one.accepted for one in found) / drafted if drafted else None,
        }

    for kind, model in (("random", plain), ("identity tail", identity_tail(plain, quarter))):
        results.say(f"autoregressive, {kind}")
        expected = texts(model, Autoregressive(), 1)
        for name, strategy, rows in strategies(config, part, tiny):
            if kind == "identity tail" or not isinstance(strategy, EarlyExit):
                measured = partial(compared, model, expected, name, strategy, rows)
                results.measure(f"{name}, {kind}", measured)


def run_speed(part: str, results: PartResults, tiny: bool) -> None:
    """Stages b and b8: one shape; a variant of the compiler's flags measures fewer strategies."""
    shape, _, variant = part.partition("-")
    config = LlamaConfig.tiny(num_layers=2) if tiny else SHAPES[shape]()
    prompt, new, repeats = (20, 17, 1) if tiny else (896, 128, 3)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    bandwidth = memory_bandwidth(1 << 24 if tiny else 1 << 32)
    settings = {"shape": shape, "dtype": dtype, "memory GB/s": bandwidth / 1e9}
    results.start(card(), **settings, prompt_tokens=prompt, new_tokens=new)
    eighth, quarter, half = (max(1, config.num_layers // divisor) for divisor in (8, 4, 2))
    model = jax.block_until_ready(identity_tail(random_model(config, dtype), eighth))
    for batch in (2,) if tiny else (1, 8, 32):
        cells = {(quarter, 4)}
        if batch == 1 and not variant and not tiny:
            cells |= {(eighth, 4), (quarter, 8), (half, 4)}
        # Each batch size needs its own engine.
        engine = Engine(model, NoText(), batch_size=batch)
        prompts = random_prompts(config, [prompt] * batch)
        measured = partial(speed, engine, prompts, new, repeats, bandwidth)
        name, base = f"batch {batch}, autoregressive", partial(measured, Autoregressive(), None)
        base = results.measure(name, base).get("tokens/s")
        for exit_layer, drafts in sorted(cells):
            name = f"batch {batch}, exit {exit_layer}, {drafts} drafts"
            strategy = SelfSpeculative(exit_layer, drafts)
            results.measure(name, partial(measured, strategy, base))


def speed(
    engine: Engine,
    prompts: list[list[int]],
    new_tokens: int,
    repeats: int,
    bandwidth: float,
    strategy: Strategy,
    base: float | None,
) -> dict[str, Any]:
    """Speed of one strategy after a warm-up. base: tokens/s of autoregressive decoding."""
    config, itemsize = engine.model.config, engine.model.dtype.itemsize
    compiling, seconds = engine.programs.compile_seconds, []
    engine.use(strategy)
    for _ in range(1 + repeats):
        before = engine.decode_seconds
        done = engine.generate(prompts, max_new_tokens=new_tokens)
        seconds.append(engine.decode_seconds - before)
    median = statistics.median(seconds[1:])
    tokens_per_second = sum(one.num_new_tokens - 1 for one in done) / median
    rounds = max(one.rounds for one in done)
    weights = (config.num_layers * config.layer_params + config.head_params) * itemsize
    slots = len(prompts) * (len(prompts[0]) + new_tokens // 2)
    cache = 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim * itemsize
    row = {"speedup": None, "accepted": None, "ideal": None, "share of the ideal": None}
    if isinstance(strategy, SelfSpeculative):
        drafted, accepted = (sum(getattr(one, k) for one in done) for k in ("drafted", "accepted"))
        drafts = drafted / sum(one.rounds for one in done)
        ideal = ideal_speedup(config, strategy.exit_layer, drafts, accepted / drafted)
        row |= {"accepted": accepted / drafted, "ideal": ideal}
        if base is not None:
            speedup = tokens_per_second / base
            row |= {"speedup": speedup, "share of the ideal": speedup / ideal}
        # The draft reads its layers of the cache once per token.
        weights *= (1 + drafts * accepted / drafted) / ideal
        cache *= 1 + drafts * strategy.exit_layer / config.num_layers
    limit = (weights + cache) / bandwidth
    return {
        "tokens/s": tokens_per_second,
        "ms a round": median / rounds * 1e3,
        "ms at the limit": limit * 1e3,
        "share of the bandwidth": limit * rounds / median,
        **row,
        "s compiling": engine.programs.compile_seconds - compiling,
    }
