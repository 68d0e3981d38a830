"""Formulations of a layer's matrix products, by the number of rows T that pass at once.

    python benchmarks/products.py --rows 1 2 3 5 9 13
    python benchmarks/products.py --rows 1 2 3 5 9 --width 128 --num-layers 24 --vocab-size 512

Weights of SmolLM2-135M's shape (30 layers, then the head) or of its proportions, random, float32;
milliseconds for all layers, the formulations in turns; then the argmax of a
vocabulary. Chosen from this: kernels [in, out] with `x @ w`, the head as the left operand,
`argmax` of sampling.py (docs/performance.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from lsjax.cli.setup import exact_products
from lsjax.decoding.cost import compiled_loop, median_seconds
from lsjax.decoding.sampling import argmax

# jax 0.10 and newer give float32 products to a library (YNNPACK); without it Eigen has them.
OPTIONS = {"": {}, ", Eigen": {"xla_cpu_experimental_ynn_fusion_type": ""}}
LAYERS: dict[str, tuple[bool, Callable]] = {  # whether the kernel is [out, in], and the product
    "x @ w": (False, lambda x, w: x @ w),
    "x @ w.T": (True, lambda x, w: x @ w.T),
    "(w @ x.T).T": (True, lambda x, w: (w @ x.T).T),
    "row by row": (False, lambda x, w: jnp.concatenate([row[None] @ w for row in x])),
}
SEARCHES = {"jnp.argmax": lambda logits: logits.argmax(-1), "argmax": argmax}
HEADS = {name: form for name, form in LAYERS.items() if name != "row by row"}


@dataclass(frozen=True)
class Arguments:
    """Formulations of a layer's matrix products."""

    rows: tuple[int, ...] = (1, 2, 3, 5, 9, 13)
    """Rows T."""
    width: int = 576
    """D of the model; its other widths are those of SmolLM2 in proportion."""
    num_layers: int = 30
    """Layers."""
    vocab_size: int = 49_152
    """Tokens of the head."""


def main(arguments: Arguments) -> None:
    """Measures and prints both tables."""
    exact_products()
    d = arguments.width
    qkv, f = d * 5 // 3, d * 8 // 3
    shapes = [(d, qkv), (d, d), (d, 2 * f), (f, d)]
    keys = jax.random.split(jax.random.key(0), arguments.num_layers)
    weights = [
        [jax.random.normal(key, shape) * shape[0] ** -0.5 for shape in shapes] for key in keys
    ]
    turned = jax.tree.map(lambda w: jnp.asarray(w.T).copy(), weights)

    def layers(product):
        def body(weights, x_TD):
            for qkv, out, gate_up, down in weights:
                x_TD = x_TD + product(product(x_TD, qkv)[:, :d], out)
                gate, up = jnp.split(product(x_TD, gate_up), 2, axis=1)
                x_TD = x_TD + product(jax.nn.silu(gate) * up, down)
                x_TD = x_TD * lax.rsqrt(jnp.square(x_TD).mean(-1, keepdims=True) + 1e-6)
            return x_TD

        return body

    def head(product):
        return lambda table, x_TD: x_TD + 1e-3 * product(x_TD, table)[:, :d]

    table_DV = jax.random.normal(keys[0], (d, arguments.vocab_size))
    for title, forms, part, arrays in (
        ("layers", LAYERS, layers, (weights, turned)),
        ("head", HEADS, head, (table_DV, jnp.asarray(table_DV.T).copy())),
    ):
        cells = [(form, name) for form in forms for name in OPTIONS]
        loops = [
            compiled_loop(
                arrays[forms[form][0]],
                part(forms[form][1]),
                jnp.ones((rows, d)),
                compiler_options=OPTIONS[name],
            )
            for form, name in cells
            for rows in arguments.rows
        ]
        seconds = iter(median_seconds(loops))
        table = Table(title, *(f"T = {rows}" for rows in arguments.rows))
        for form, name in cells:
            table.add_row(form + name, *(f"{next(seconds) * 1e3:.3g}" for _ in arguments.rows))
        Console(width=100).print(table)

    def search(find):
        # The index goes back into the logits, so that no search can be left out.
        return lambda _, logits_TV: logits_TV.at[:, 0].add(1e-9 * find(logits_TV))

    loops = [
        compiled_loop(None, search(find), jax.random.normal(keys[0], (rows, arguments.vocab_size)))
        for find in SEARCHES.values()
        for rows in arguments.rows
    ]
    seconds = iter(median_seconds(loops))
    table = Table("argmax", *(f"T = {rows}" for rows in arguments.rows))
    for name in SEARCHES:
        table.add_row(name, *(f"{next(seconds) * 1e3:.2f}" for _ in arguments.rows))
    Console(width=100).print(table)
    print(f"ms, jax {jax.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
