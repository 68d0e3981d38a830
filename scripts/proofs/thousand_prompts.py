"""Drafts change no token of greedy texts: 1,000 prompts for each kind of drafts and of weights.

    python scripts/proofs/thousand_prompts.py
    python scripts/proofs/thousand_prompts.py --model smollm2 --exits 4 8 15 --only blocks

Texts of a strategy are compared with those of autoregressive decoding without exit blocks, in
float32. Eight rows share the prompts. Without --model, tiny random models of several families
decode. The costs of rounds are chosen so that `auto` uses every source of drafts. Exits with 1 if a
text differs or a source is missing.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
import tyro
from flax import nnx

import lsjax
from lsjax.cli.setup import exact_products
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.strategy import Strategy

SECONDS = ((1.0, 1.01, 1.02), *[(math.inf, 1.3, 1.5)] * 3)
FAMILIES = {
    "Llama": {},
    "Qwen3": dict(qk_norm="head"),
    "OLMo 2": dict(qk_norm="full", norm_after=True),
    "Mistral": dict(sliding_window=6),
}


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    model: str | None = None
    """A model in any format. By default, tiny random ones."""
    exits: tuple[int, ...] = (1, 2, 3)
    """Exits that draft. Exit blocks are behind the first two."""
    prompts: int = 1_000
    """Prompts."""
    new_tokens: int = 12
    """New tokens of each."""
    only: str = ""
    """Only cases whose name contains this. Cases of `auto` must be among them."""


def main(arguments: Arguments) -> int:
    """Decodes all prompts with each strategy and compares the texts. Returns the exit code."""
    exact_products()
    good, seen = True, set()
    for family, model in models(arguments.model):
        prompts = prompts_of(model, arguments.prompts)
        rounded = lsjax.with_int8(model)
        blocks = with_noise(lsjax.with_exit_blocks(model, arguments.exits[:2]))
        drafts = strategies(arguments.exits, model.vocab_size)
        only_blocks = {name: one for name, one in drafts.items() if name != "int8 layers"}
        cases = (
            ("", model, drafts, model),
            (", int8 weights", rounded, only_blocks, rounded),
            (", exit blocks", blocks, only_blocks, model),
        )
        for words, own, chosen, base in cases:
            chosen = {
                name: one for name, one in chosen.items() if arguments.only in f"{words}, {name}"
            }
            expected = texts_of(base, lsjax.Autoregressive(), prompts, arguments) if chosen else []
            for name, strategy in chosen.items():
                found = texts_of(own, strategy, prompts, arguments)
                equal = sum(
                    one.token_ids == two.token_ids for one, two in zip(found, expected, strict=True)
                )
                sources = {source for one in found for source in one.sources or ()}
                line = f"{family}{words}, {name}: {equal} of {len(prompts)} texts are equal"
                if sources:
                    line += f"; sources: {', '.join(sorted(sources))}"
                print(line, flush=True)
                good, seen = good and equal == len(prompts), seen | sources
    missing = {"none", "lookup", *(f"exit {e}" for e in arguments.exits)} - seen
    if missing:
        print(f"no draft came from {', '.join(sorted(missing))}")
    return int(not good or bool(missing))


def models(path: str | None) -> Iterator[tuple[str, lsjax.Llama]]:
    """The model of that path, or a tiny one of each family."""
    if path:
        yield path, lsjax.load(path)
        return
    for family, settings in FAMILIES.items():
        config = lsjax.LlamaConfig.tiny(**settings)
        yield family, jax.jit(lambda config=config: lsjax.Llama(config, rngs=nnx.Rngs(0)))()


def strategies(exits: tuple[int, ...], vocab_size: int) -> Mapping[str, Strategy]:
    """What drafts."""
    seconds = SECONDS[: 1 + len(exits)]
    auto = dict(lengths=(0, 2, 5), seconds=seconds)
    rounded = lsjax.DraftVocabulary.every(vocab_size)
    return {
        "static": lsjax.SelfSpeculative(exits[1], 3),
        "auto": lsjax.Adaptive(exits, **auto),
        "int8 head": lsjax.Adaptive(exits, rounded, **auto),
        "int8 layers": lsjax.Int8Drafts(exits[1], 3),
    }


def prompts_of(model: lsjax.Llama, number: int) -> list[list[int]]:
    """Random tokens. A fifth of the prompts repeat themselves, which lookups continue."""
    random = np.random.default_rng(0)
    most = model.vocab_size - 2
    found = [random.integers(0, most, random.integers(1, 9)).tolist() for _ in range(number)]
    return [prompt * 5 if at % 5 == 0 else prompt for at, prompt in enumerate(found)]


def with_noise(model: lsjax.Llama) -> lsjax.Llama:
    """The model with blocks whose drafts are their own."""

    def changed(leaf):
        key = jax.random.fold_in(jax.random.key(0), leaf.size)
        return leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    model.exit_blocks = jax.tree.map(changed, model.exit_blocks)
    return model


def texts_of(
    model: lsjax.Llama, strategy: Strategy, prompts: list[list[int]], arguments: Arguments
) -> list[lsjax.Completion]:
    """The texts of all prompts, of which eight decode side by side."""
    engine = lsjax.Engine(model, ByteTokenizer(add_bos=False), strategy, batch_size=8)
    return engine.generate(prompts, max_new_tokens=arguments.new_tokens)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
