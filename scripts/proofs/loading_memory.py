"""The most memory that loading a Llama-3 8B with int8 weights takes.

    python scripts/proofs/loading_memory.py --directory llama3_8b_random

Writes random bfloat16 weights of that shape (16 GB), unless they are there, and loads them in
another process. Reads its anonymous memory every 20 ms: that is what arrays take, without the pages
of the files. Exits with 1 if the peak is above 1.15 times the int8 model and a layer.
"""

import json
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import lsjax
from lsjax.cli.setup import keep_compiled_programs
from lsjax.config import LlamaConfig
from lsjax.model.parameters import named_leaves

LIMIT, GB = 1.15, 1e9


@dataclass(frozen=True)
class Arguments:
    """What to load."""

    directory: Path
    """Folder of the weights."""
    layers: int = 32
    """Layers of the model."""
    load_only: bool = False
    """Load, and print what was measured."""


def main(arguments: Arguments) -> int:
    """Prints the peak and the limit. Returns 1 if the peak is above it."""
    if arguments.load_only:
        print(json.dumps(loaded(arguments.directory)))
        return 0
    if not arguments.directory.exists():
        write(arguments)
    command = [sys.executable, __file__, "--directory", f"{arguments.directory}", "--load-only"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    layer = 2 * LlamaConfig.llama3_8b().layer_params
    limit = LIMIT * found["model"] + layer
    print(
        f"int8 model {found['model'] / GB:.2f} GB, peak {found['peak'] / GB:.2f} GB above the "
        f"{found['before'] / GB:.2f} GB of the program, limit {limit / GB:.2f} GB"
    )
    return int(found["peak"] > limit)


def write(arguments: Arguments) -> None:
    """A model whose arrays take no memory: the rows of each are the same."""
    config = LlamaConfig.llama3_8b(num_layers=arguments.layers)
    shape = jax.eval_shape(lambda: lsjax.Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    some = np.random.default_rng(0).normal(0, 0.02, 2**16).astype(jnp.bfloat16)
    leaves = [
        np.broadcast_to(np.resize(some, leaf.shape[1:]), leaf.shape)
        for leaf in named_leaves(shape).values()
    ]
    model = jax.tree.unflatten(jax.tree.structure(shape), leaves)
    lsjax.save(model, arguments.directory, shard_bytes=10**9)


def loaded(directory: Path) -> dict[str, int]:
    """Bytes of the loaded model, of the program before, and of the peak above that."""
    keep_compiled_programs()
    jnp.zeros(1).block_until_ready()
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = jax.block_until_ready(lsjax.load(directory, dtype=jnp.bfloat16, weights="int8"))
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"model": size, "before": before, "peak": max(peak[0], anonymous()) - before}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
