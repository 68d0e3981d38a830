"""Autoregressive decoding beside transformers' generate: same weights, prompts, threads, process.

    make peers
    .venv/bin/python -m lsjax.cli.convert models/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    .venv/bin/python benchmarks/vs_transformers.py models/smollm2

Both continue the same prompts greedily by the same number of tokens, in turns, after a warm-up.
Tokens per second count the tokens after the first over the time that they took: for transformers
the time of N tokens minus the time of one, for lsjax its decode time, which leaves out the same.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.data.tokenizers import Tokenizer
from lsjax.evaluation.exactness import FLOAT32_MARGIN, first_difference

PROMPTS = [
    "Once upon a time, there was a little girl named Lily who",
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It",
    "Photosynthesis is the process by which plants",
]


@dataclass(frozen=True)
class Arguments:
    """Autoregressive decoding beside transformers' generate."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory (see lsjax.cli.convert)."""
    new_tokens: int = 64
    """Tokens per prompt."""
    repeats: int = 5
    """Turns of each side."""
    threads: int = torch.get_num_threads()
    """For torch; XLA takes all cores that the process may use (taskset limits both)."""


def main(arguments: Arguments) -> None:
    """Measures in turns and prints tokens per second, medians over prompts and repeats."""
    keep_compiled_programs()
    exact_products()
    torch.set_num_threads(arguments.threads)
    tokenizer = lsjax.load_tokenizer(arguments.model)
    model = lsjax.load(arguments.model)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    peers = {
        f"transformers {transformers.__version__}, {name}": peer(arguments, dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    sides = {"lsjax, float32": own(model, tokenizer, arguments.new_tokens)} | peers
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[list[int]]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        for prompt in prompts:
            for name, run in sides.items():
                new, seconds = run(prompt)
                if repeat == 0:  # the warm-up
                    tokens[name].append(new)
                else:
                    speeds[name].append((arguments.new_tokens - 1) / seconds)
    lsjax_name, peer_name = list(sides)[:2]
    for prompt, found, expected in zip(prompts, tokens[lsjax_name], tokens[peer_name], strict=True):
        difference = first_difference(model, prompt, expected, found)
        if difference is not None and not difference.margin <= FLOAT32_MARGIN:
            raise SystemExit(f"the two float32 sides disagree: {difference}")

    base = statistics.median(speeds[peer_name])
    title = f"{arguments.model.name}: {arguments.new_tokens} tokens, {arguments.threads} threads"
    table = Table("side", "tokens/s", "from", "to", f"over {peer_name}", title=title)
    for name, values in speeds.items():
        median = statistics.median(values)
        figures = (median, min(values), max(values))
        table.add_row(name, *(f"{x:.1f}" for x in figures), f"{median / base:.2f}x")
    Console().print(table)


def own(
    model: lsjax.Llama, tokenizer: Tokenizer, new_tokens: int
) -> Callable[[list[int]], tuple[list[int], float]]:
    """lsjax: the new tokens, and the seconds for all but the first."""
    engine = lsjax.Engine(model, tokenizer, ignore_end=True)

    def run(prompt: list[int]) -> tuple[list[int], float]:
        (completion,) = engine.generate([prompt], max_new_tokens=new_tokens)
        return completion.token_ids, completion.decode_seconds

    return run


def peer(
    arguments: Arguments, dtype: torch.dtype
) -> Callable[[list[int]], tuple[list[int], float]]:
    """transformers: the same."""
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        ids = torch.tensor([prompt])
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
            )
        return np.asarray(out[0, len(prompt) :]).tolist(), time.perf_counter() - begin

    def run(prompt: list[int]) -> tuple[list[int], float]:
        new, seconds = generate(prompt, arguments.new_tokens)
        return new, seconds - generate(prompt, 1)[1]

    return run


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
