"""Compiles attention in decoding and training for NVIDIA cards, and prints the kernel of each.

    pip install -e '.[cuda]'
    python scripts/proofs/gpu_kernels.py

No card is needed. The table has a row for each card, type and head size. Decoding and prompts have
8 K/V heads and 2,112 slots; their columns are query heads of a K/V head x new tokens. Training has
1,024 packed tokens and is compiled with its gradients. Exits with 1 if a program does not compile,
or if its kernel is not the one that lsjax chose.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from lsjax.aot.chips import CHIPS, slice_of
from lsjax.aot.hlo import attention_kernel
from lsjax.config import MeshConfig
from lsjax.kernels import flash_decoding, flash_prefill
from lsjax.kernels.self_attention import _first_supported
from lsjax.kernels.shared_memory import MOST_STEPS
from lsjax.model.attention import self_attention
from lsjax.model.block import _attend
from lsjax.sharding import make_mesh

SIZES = (64, 80, 96, 128, 256)
DTYPES = (jnp.float32, jnp.bfloat16)
KV_HEADS, SLOTS, LENGTH = 8, 2112, 1024
DECODING = ((4, 1), (4, 5), (8, 5), (4, 32), (4, 512))  # query heads of a K/V head, new tokens


def main(cards: list[str]) -> int:
    """Prints the table. Returns 1 if a program does not compile, or its kernel was not chosen."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    names = [f"{group} x {steps}" for group, steps in DECODING]
    print("| card | type | head size |", " | ".join(f"decoding {name}" for name in names), end="")
    print(" | training |\n|---|---|---|" + "---|" * (len(DECODING) + 1))
    good = True
    for card in cards:
        mesh = make_mesh(MeshConfig(), slice_of(f"{card}:1")[1])
        for dtype in DTYPES:
            # As in the programs: products of float32 are exact.
            precision = "highest" if dtype == jnp.float32 else "default"
            for size in SIZES:
                with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
                    found = [decoding(mesh, dtype, size, *shape) for shape in DECODING]
                    found.append(training(mesh, dtype, size))
                good &= all(chosen == kernel for chosen, kernel in found)
                cells = [card, jnp.dtype(dtype).name, str(size), *(kernel for _, kernel in found)]
                print("|", " | ".join(cells), "|", flush=True)
    return 0 if good else 1


def decoding(mesh: Mesh, dtype: type, size: int, group: int, steps: int) -> tuple[str, str]:
    """The kernel that lsjax chose, and that of the compiled program."""
    q = shape(mesh, (1, steps, KV_HEADS * group, size), dtype)
    new = shape(mesh, (1, steps, KV_HEADS, size), dtype)
    cache = shape(mesh, (1, KV_HEADS, SLOTS, size), dtype)
    positions = shape(mesh, (1, steps), jnp.int32)
    module = flash_decoding if steps <= MOST_STEPS else flash_prefill
    name = module.__name__.rpartition(".")[2].replace("_", " ")
    chosen = name if module.fits(q, cache) else "xla"
    arguments = q, new, new, cache, cache, positions
    return chosen, compiled(partial(_attend, None), *arguments)


def training(mesh: Mesh, dtype: type, size: int) -> tuple[str, str]:
    """The kernel that lsjax chose, and that of the compiled gradient."""
    q = shape(mesh, (1, LENGTH, 4 * KV_HEADS, size), dtype)
    k = shape(mesh, (1, LENGTH, KV_HEADS, size), dtype)
    segments = shape(mesh, (1, LENGTH), jnp.int32)

    def backward(q, k, v, segments, dy):
        return jax.vjp(lambda *qkv: self_attention(*qkv, segments), q, k, v)[1](dy)

    return _first_supported(q, packed=True), compiled(backward, q, k, k, segments, q)


def compiled(function: Callable, *arguments: jax.ShapeDtypeStruct) -> str:
    """The kernel of a compiled program, or the compiler's error."""
    try:
        return attention_kernel([jax.jit(function).lower(*arguments).compile().as_text()])
    except JaxRuntimeError as error:
        return " ".join(str(error).split())[:80]


def shape(mesh: Mesh, sizes: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
    """An argument on the card."""
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    known = [chip.name for chip in CHIPS if chip.platform == "cuda"]
    parser.add_argument("--cards", nargs="+", default=known, choices=known)
    sys.exit(main(parser.parse_args().cards))
