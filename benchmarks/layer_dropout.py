"""What layer dropout saves: steps that compute layers for the rows that keep them only.

    python benchmarks/layer_dropout.py
    python benchmarks/layer_dropout.py --remat nothing_saveable
    python benchmarks/layer_dropout.py --no-time --memory

Random parameters and tokens, p(l) = p_max l / (L - 1). Steps run in turns, in an order that is
drawn for each. `predicted` is the share of FLOPs that is left: a layer counts by the rows that it
ran on in these very steps, the head in full (attention and optimizer as in train_step.py). `of what
is predicted` is the time saved over the FLOPs saved.
"""

import statistics
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from train_step import Workload, compiled, jax_step, make_batch, shape_of, step_flops

from lsjax.cli.setup import exact_products
from lsjax.config import LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.training.layer_dropout import drop_rates, keep_counted

STEPS = 1_000


@dataclass(frozen=True)
class Arguments(Workload):
    """What layer dropout saves."""

    batch_size: int = 16
    """Rows."""
    seq_len: int = 128
    """Tokens of a row."""
    p_max: float = 0.8
    """Rate of the last layer."""
    repeats: int = 10
    """Steps of each kind."""
    masks: bool = False
    """Run steps with masks on all rows, too."""
    time: bool = True
    """Measure times of steps."""
    memory: bool = False
    """Temporary memory of the compiled steps, from the compiler."""


def config_of(arguments: Arguments, skip: str | None) -> StepConfig:
    """A step with layer dropout of this kind, or with none."""
    dropout = LayerDropoutConfig()
    if skip is not None:
        dropout = LayerDropoutConfig(p_max=arguments.p_max, distribution="linear", skip=skip)
    return StepConfig(num_steps=STEPS, layer_dropout=dropout, remat=arguments.remat)


def rows_left(arguments: Arguments, shape: LlamaConfig, step: int) -> float:
    """Share of all layers' rows that a step with "gather" runs."""
    config = config_of(arguments, "gather")
    rates_L = drop_rates(config.layer_dropout, shape.num_layers, step, STEPS)
    rows_SR = jnp.arange(arguments.batch_size)[None]
    keep_LSR, _ = keep_counted(rates_L, config.seed, step, rows_SR)
    return float(keep_LSR.mean())


def times(arguments: Arguments, shape: LlamaConfig) -> Table:
    """Steps of each kind in turns."""
    batch = make_batch(shape, arguments)
    kinds = (None, "gather", "mask") if arguments.masks else (None, "gather")
    runs = {kind: jax_step(config_of(arguments, kind), shape, batch) for kind in kinds}
    for run in runs.values():
        run(0)
    seconds: dict[str | None, list[float]] = {kind: [] for kind in runs}
    left, rng = [], np.random.default_rng(0)
    plain = step_flops(shape, arguments, 1)
    head = plain - step_flops(shape, arguments, 0)
    for step in range(arguments.repeats):
        for turn in rng.permutation(len(kinds)):
            seconds[kinds[turn]].append(runs[kinds[turn]](step))
        rows = rows_left(arguments, shape, step)
        left.append((rows * (plain - head) + head) / plain)
    columns = ("seconds", "over p = 0", "predicted", "of what is predicted")
    table = Table("skip", *columns, title=title(arguments, shape))
    for kind in runs:
        # Of neighbours in time, so that a busy machine slows both.
        ratio = float(np.mean(np.array(seconds[kind]) / np.array(seconds[None])))
        predicted = statistics.mean(left) if kind == "gather" else 1.0
        saved = f"{(1 - ratio) / (1 - predicted):.3f}" if kind == "gather" else ""
        mean = f"{statistics.mean(seconds[kind]):.3f}"
        table.add_row(kind or "p = 0", mean, f"{ratio:.3f}", f"{predicted:.3f}", saved)
    return table


def memory(arguments: Arguments, shape: LlamaConfig) -> Table:
    """Temporary memory of steps of each kind."""
    columns = ("remat", "temporary MB", "over p = 0", "seconds to trace and compile")
    table = Table("skip", *columns, title=title(arguments, shape))
    jax.config.update("jax_enable_compilation_cache", False)
    for remat in ("none", "nothing_saveable"):
        plain = None
        for kind in (None, "mask", "gather"):
            config = config_of(replace(arguments, remat=remat), kind)
            program, seconds = compiled(config, shape, arguments)
            size = program.memory_analysis().temp_size_in_bytes
            plain = plain or size
            cells = (f"{size / 1e6:.0f}", f"{size / plain:.3f}", f"{seconds:.1f}")
            table.add_row(kind or "p = 0", remat, *cells)
    return table


def title(arguments: Arguments, shape: LlamaConfig) -> str:
    """What was measured."""
    return (
        f"{arguments.shape}, {shape.num_layers} layers, batch {arguments.batch_size} x "
        f"{arguments.seq_len}, p_max {arguments.p_max}, remat {arguments.remat}, "
        f"jax {jax.__version__}"
    )


def main(arguments: Arguments) -> None:
    """Measures and prints what was asked for."""
    exact_products()
    shape, console = shape_of(arguments), Console(width=110)
    if arguments.time:
        console.print(times(arguments, shape))
    if arguments.memory:
        console.print(memory(arguments, shape))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
