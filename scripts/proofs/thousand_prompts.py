"""Greedy texts of the strategy auto equal those of autoregressive decoding, for 1,000 prompts.

    python scripts/proofs/thousand_prompts.py

A tiny random model in float32. Eight rows share the prompts. The costs of rounds are chosen so that
every source of drafts is used. Exits with 1 if a text differs or a source is missing.
"""

import math
import sys

import jax
import numpy as np
from flax import nnx

import lsjax
from lsjax.cli.setup import exact_products
from lsjax.data.tokenizer_backends import ByteTokenizer

SECONDS = ((1.0, 1.01, 1.02), *[(math.inf, 1.3, 1.5)] * 3)
SOURCES = {"none", "lookup", "exit 1", "exit 2", "exit 3"}


def main() -> int:
    """Decodes all prompts with both strategies and compares the texts."""
    exact_products()
    config = lsjax.LlamaConfig.tiny()
    model = jax.jit(lambda: lsjax.Llama(config, rngs=nnx.Rngs(0)))()
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 256, random.integers(1, 9)).tolist() for _ in range(800)]
    prompts += [prompt * 5 for prompt in prompts[:200]]  # which lookups continue
    auto = lsjax.Adaptive((1, 2, 3), lengths=(0, 2, 5), seconds=SECONDS)
    engine, texts = lsjax.Engine(model, ByteTokenizer(add_bos=False), batch_size=8), []
    for strategy in (lsjax.Autoregressive(), auto):
        engine.use(strategy)
        texts.append(engine.generate(prompts, max_new_tokens=12))
    plain, chosen = texts
    equal = sum(one.token_ids == two.token_ids for one, two in zip(plain, chosen, strict=True))
    sources = {name for one in chosen for name in one.sources}
    print(f"{equal} of {len(prompts)} texts are equal; sources: {', '.join(sorted(sources))}")
    return int(equal < len(prompts) or sources != SOURCES)


if __name__ == "__main__":
    sys.exit(main())
