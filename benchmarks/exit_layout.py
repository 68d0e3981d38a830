"""Where the losses of the exits are computed: slots after the scan, or inside it under `lax.cond`.

    python benchmarks/exit_layout.py --shape small_vocab --batch-size 8
    python benchmarks/exit_layout.py --shape small_vocab --batch-size 8 --curriculum all
    python benchmarks/exit_layout.py --shape smollm2

Steps with the same loss and gradients run in turns, in an order that is drawn:

    slots            what lsjax does: outputs of the exits that are on, then their losses
    in scan          each layer's loss and gradients under `cond`; the scan keeps them
    in scan, again   under `cond` too, but computed again in the backward pass, so that it keeps no
                     more than the layer's output

A round is 8 steps, one of each phase where R = 8. Memory is what the compiler says.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table
from train_step import (
    ALL_ON,
    ROTATIONAL,
    Workload,
    compared,
    compiled,
    in_turns,
    jax_step,
    make_batch,
    shape_of,
    title,
)

from lsjax.cli.setup import exact_products, keep_freed_memory
from lsjax.config import LayerDropoutConfig
from lsjax.model.llama import cast_matrices
from lsjax.model.rope import rope_angles
from lsjax.training import step as training_step
from lsjax.training.early_exit import enabled_exits, loss_weights
from lsjax.training.exit_losses import cross_entropy
from lsjax.training.forward import layer_runner
from lsjax.training.loss import head_loss, head_of
from lsjax.training.objective import loss_positions, objective


@dataclass(frozen=True)
class Arguments(Workload):
    """Where the losses of the exits are computed."""

    curriculum: Literal["rotational", "all"] = "rotational"
    """Which exits are on."""
    repeats: int = 2
    """Rounds of steps."""


def objective_in_scan(config, model, batch, step, rows_B, num_labels, *, again: bool, **_):
    """`objective`, without layer dropout, with the exit's loss in each layer of the scan."""
    shape, labels_BT = model.config, batch["labels_BT"]
    enabled_L = enabled_exits(config.early_exit, shape.num_layers, step, config.num_steps)
    weights_L = loss_weights(config.early_exit, shape.num_layers, step, config.num_steps)
    weights_L /= jnp.maximum(num_labels, 1)
    narrow, head = cast_matrices(model, config.dtype), head_of(model)
    positions = loss_positions(
        config, labels_BT, step, rows_B, jnp.zeros(1, int), jnp.ones(1, bool)
    )
    x_BTD = narrow.embed_rows(batch["tokens_BT"])
    rope = rope_angles(batch["positions_BT"], shape, x_BTD.dtype)
    run = layer_runner(config, rope, batch["segments_BT"])

    def exit_loss(head, x_BTD, weight):
        total, sum_S = head_loss(
            cross_entropy, config.z_loss, head, x_BTD[None], labels_BT, positions, weight[None]
        )
        return total, sum_S[0]

    if again:
        policy = jax.checkpoint_policies.nothing_saveable
        exit_loss = jax.checkpoint(exit_loss, policy=policy, prevent_cse=False)

    def layer(carry, inputs):
        x_BTD, total = carry
        block, on, weight = inputs
        x_BTD = run(block, x_BTD, None)
        nothing = jnp.zeros((), jnp.float32)
        added, sum_ = lax.cond(on, exit_loss, lambda *_: (nothing, nothing), head, x_BTD, weight)
        return (x_BTD, total + added), sum_

    start = x_BTD, jnp.zeros((), jnp.float32)
    (_, total), sums_L = lax.scan(layer, start, (narrow.layers, enabled_L, weights_L))
    return total, sums_L


LAYOUTS = {
    "slots": objective,
    "in scan": partial(objective_in_scan, again=False),
    "in scan, again": partial(objective_in_scan, again=True),
}


def measure(arguments: Arguments) -> Table:
    """Times and memory of each layout, and what its gradient norm is."""
    shape = shape_of(arguments)
    batch = make_batch(shape, arguments)
    config = ROTATIONAL if arguments.curriculum == "rotational" else ALL_ON
    config = replace(config, layer_dropout=LayerDropoutConfig(), remat=arguments.remat)
    runs, memory, norms = {}, {}, {}
    for name, layout in LAYOUTS.items():
        training_step.objective = layout  # before the step is traced
        program, _ = compiled(config, shape, arguments)
        memory[name] = program.memory_analysis().temp_size_in_bytes
        runs[name] = jax_step(config, shape, batch)
        runs[name](0)
        norms[name] = float(runs[name].metrics["grad_norm"])
    np.testing.assert_allclose([*norms.values()], norms["slots"], rtol=1e-4)
    seconds = in_turns(runs, 8, arguments.repeats)
    columns = ("seconds", "over slots", "from", "to", "temporary MB", "gradient norm")
    table = Table("losses", *columns, title=f"{title(arguments, shape)}, {arguments.curriculum}")
    for name in runs:
        cells = [f"{figure:.3f}" for figure in compared(seconds, name, "slots")]
        table.add_row(name, *cells, f"{memory[name] / 1e6:.0f}", f"{norms[name]:.6f}")
    return table


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    exact_products()
    keep_freed_memory()
    Console(width=120).print(measure(arguments))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
