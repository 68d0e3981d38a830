"""Stages b and b8: decoding of 1B and 8B shapes, every draft right (an identity tail).

The limit of a round is the bytes of weights and of cache in use that it reads, over the memory's
measured bandwidth. The ideal speedup counts weights alone (lsjax/decoding/cost.py).
"""

import statistics
from functools import partial

import jax

from accelerator_stages.inputs import Numbers, random_model, random_prompts
from accelerator_stages.report import Report, Row, card
from lsjax.cli.setup import choose_dtype
from lsjax.config import LlamaConfig
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.cost import ideal_speedup, memory_bandwidth, weight_bytes
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.exactness import identity_tail

SHAPES = {"1b": LlamaConfig.llama3_2_1b, "8b": LlamaConfig.llama3_8b}


def run(part: str, report: Report, tiny: bool) -> None:
    """Decodes by one shape; a variant of the compiler's flags measures fewer strategies."""
    shape, _, variant = part.partition("-")
    config = LlamaConfig.tiny(num_layers=2) if tiny else SHAPES[shape]()
    prompt, new, repeats = (20, 17, 1) if tiny else (896, 128, 3)
    report.start(card(), shape=shape, prompt_tokens=prompt, new_tokens=new)
    bandwidth = memory_bandwidth(1 << 24 if tiny else 1 << 32)
    report.put(bandwidth=bandwidth, dtype=(dtype := choose_dtype("auto")))
    report.say(f"{dtype}, memory {bandwidth / 1e9:.0f} GB/s; making the model")
    eighth, quarter, half = (max(1, config.num_layers // divisor) for divisor in (8, 4, 2))
    model = jax.block_until_ready(identity_tail(random_model(config, dtype), eighth))
    tokenizer = Numbers(config.vocab_size)
    for batch in (2,) if tiny else (1, 8, 32):
        cells = {(quarter, 4)}
        if batch == 1 and not variant and not tiny:
            cells |= {(eighth, 4), (quarter, 8), (half, 4)}
        # A batch reads its prompts into a row of its own, so each batch is another engine.
        engine = Engine(model, tokenizer, batch_size=batch, ignore_end=True)
        prompts = random_prompts(config, [prompt] * batch)
        measured = partial(measure, engine, prompts, new, repeats, bandwidth)
        base = report.measure(
            f"batch {batch}, autoregressive", partial(measured, Autoregressive(), None)
        )
        for exit_layer, drafts in sorted(cells):
            name = f"batch {batch}, exit {exit_layer}, {drafts} drafts"
            strategy = SelfSpeculative(exit_layer, drafts)
            report.measure(name, partial(measured, strategy, base.get("tokens/s")))


def measure(
    engine: Engine,
    prompts: list[list[int]],
    new_tokens: int,
    repeats: int,
    bandwidth: float,
    strategy: Strategy,
    base: float | None,
) -> Row:
    """Speed of one strategy after a warm-up. base: tokens/s of autoregressive decoding."""
    config, itemsize = engine.model.config, engine.model.dtype.itemsize
    compiling, seconds = engine.compile_seconds, []
    engine.use(strategy)
    for _ in range(1 + repeats):
        before = engine.decode_seconds
        done = engine.generate(prompts, max_new_tokens=new_tokens)
        seconds.append(engine.decode_seconds - before)
    median = statistics.median(seconds[1:])
    speed = sum(one.num_new_tokens - 1 for one in done) / median
    rounds = max(one.rounds for one in done)
    in_use = len(prompts[0]) + new_tokens // 2
    weights = weight_bytes(config, itemsize)
    cache = config.cache_bytes(len(prompts), in_use, itemsize)
    row: Row = {"speedup": None, "accepted": None, "ideal": None, "share of the ideal": None}
    if isinstance(strategy, SelfSpeculative):
        drafted, accepted = (sum(getattr(one, k) for one in done) for k in ("drafted", "accepted"))
        drafts = drafted / sum(one.rounds for one in done)
        ideal = ideal_speedup(config, strategy.exit_layer, drafts, accepted / drafted)
        row |= {"accepted": accepted / drafted, "ideal": ideal}
        if base is not None:
            row |= {"speedup": speed / base, "share of the ideal": speed / base / ideal}
        # The draft reads its layers of the cache once for each of its tokens.
        weights *= (1 + drafts * accepted / drafted) / ideal
        cache *= 1 + drafts * strategy.exit_layer / config.num_layers
    limit = (weights + cache) / bandwidth
    return {
        "tokens/s": speed,
        "ms a round": median / rounds * 1e3,
        "ms at the limit": limit * 1e3,
        "share of the bandwidth": limit * rounds / median,
        **row,
        "s compiling": engine.compile_seconds - compiling,
    }
