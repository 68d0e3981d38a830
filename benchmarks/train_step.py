"""What a training step costs: LayerSkip beside plain training, and plain training beside torch.

    python benchmarks/train_step.py --shape smollm2
    python benchmarks/train_step.py --shape small_vocab --batch-size 8
    python benchmarks/train_step.py --shape small_vocab --no-time --memory --compile
    python benchmarks/train_step.py --shape smollm2 --no-time --torch       # extra: peers

Random parameters and tokens, float32 on CPUs. Steps run in turns, in an order that is drawn for
each turn, so that none always follows the same one:

    plain       loss of the last exit, AdamW
    nothing on  rising layer dropout and gradual exits, at a step that has neither yet
    rotational  R = 8, p_max = 0.1, one step of each of the 8 phases
    bfloat16    plain, its computation in bfloat16 (--bfloat16)

`predicted` is the ratio of FLOPs: 2 for each parameter of a layer and of the head that a token
passes, and 4 T N H for attention in each layer, 3 times for forward and backward. A layer that is
left out of some rows is computed for all of them, so layer dropout saves nothing here. Seconds are
means over the 8 phases, of medians over the repeats; `from` and `to` are the ratios of single
rounds.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from lsjax.cli.setup import exact_products, keep_freed_memory
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.model.llama import Llama, stacked
from lsjax.training.early_exit import enabled_exits
from lsjax.training.step import init_state, make_train_step

STEPS = 80
PAUSE = 0.5  # seconds before each step, in which the threads of the other library go to sleep
PLAIN = StepConfig(num_steps=STEPS)
NOTHING_ON = StepConfig(
    num_steps=STEPS,
    layer_dropout=LayerDropoutConfig(p_max=0.1, schedule="exponential"),
    early_exit=EarlyExitConfig(curriculum="gradual"),
)
ROTATIONAL = StepConfig(
    num_steps=STEPS,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.2),
)
ALL_ON = StepConfig(num_steps=STEPS, early_exit=EarlyExitConfig(curriculum="all"))


@dataclass(frozen=True)
class Workload:
    """Model and batch that steps are measured on."""

    shape: Literal["smollm2", "small_vocab"] = "small_vocab"
    """SmolLM2-135M, or 16 layers of width 512 with a vocabulary of 512."""
    batch_size: int = 4
    """Rows."""
    seq_len: int = 256
    """Tokens of a row."""
    layers: int | None = None
    """Layers instead of the shape's."""
    remat: str = "none"
    """What layers keep for the backward pass."""


@dataclass(frozen=True)
class Arguments(Workload):
    """What a training step costs."""

    shape: Literal["smollm2", "small_vocab"] = "smollm2"
    """SmolLM2-135M, or 16 layers of width 512 with a vocabulary of 512."""
    repeats: int = 3
    """Rounds of 8 steps of each kind."""
    time: bool = True
    """Measure times of steps."""
    bfloat16: bool = False
    """Measure the plain step with its computation in bfloat16 too."""
    torch: bool = False
    """Measure torch's eager step on the same model in the same run."""
    keep_freed_memory: bool = True
    """As train.py does, for torch too."""
    memory: bool = False
    """Temporary memory of the compiled steps, from the compiler."""
    compile: bool = False
    """Time to compile at 8 and at 32 layers."""


def shape_of(arguments: Workload) -> LlamaConfig:
    """The model's shape."""
    changes = {} if arguments.layers is None else {"num_layers": arguments.layers}
    if arguments.shape == "smollm2":
        return LlamaConfig.smollm2_135m(**changes)
    small = dict(vocab_size=512, hidden_size=512, intermediate_size=1_408, num_layers=16)
    heads = dict(num_heads=8, num_kv_heads=4, head_dim=64, init_std=0.02, tie_embeddings=True)
    return LlamaConfig.tiny(**(small | heads | changes))


def make_batch(shape: LlamaConfig, arguments: Workload) -> dict[str, np.ndarray]:
    """Random tokens, one document a row, every token labelled."""
    rows, steps = arguments.batch_size, arguments.seq_len
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (rows, steps + 1), dtype=np.int32)
    return dict(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        segments_BT=np.ones((rows, steps), np.int32),
        positions_BT=np.broadcast_to(np.arange(steps, dtype=np.int32), (rows, steps)),
    )


def step_flops(shape: LlamaConfig, arguments: Workload, heads: float) -> float:
    """FLOPs of a step in which each token passes the head `heads` times."""
    attention = 4 * arguments.seq_len * shape.num_heads * shape.head_dim
    layers = shape.num_layers * (2 * shape.layer_params + attention)
    tokens = arguments.batch_size * arguments.seq_len
    return 3 * tokens * (layers + 2 * heads * shape.head_params)


def jax_step(config: StepConfig, shape: LlamaConfig, batch):
    """A function that runs one step and gives its seconds; `first` is the step's number. What the
    step measured is `metrics` of the function."""
    state = init_state(config, jax.jit(lambda: stacked(Llama(shape, rngs=nnx.Rngs(0))))())
    step = make_train_step(config)

    def run(first: int) -> float:
        nonlocal state
        time.sleep(PAUSE)
        state = replace(state, step=jnp.int32(first))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        run.metrics = metrics
        return time.perf_counter() - start

    return run


def torch_step(shape: LlamaConfig, batch):
    """The same for transformers' Llama in torch, eager, with fused attention."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
    tokens = torch.tensor(batch["tokens_BT"], dtype=torch.long)
    labels = torch.tensor(batch["labels_BT"], dtype=torch.long).flatten()

    def run(_: int) -> float:
        time.sleep(PAUSE)
        start = time.perf_counter()
        logits = model(input_ids=tokens).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return run


def in_turns(
    runs: Mapping[str, Callable[[int], float]], phases: int, repeats: int
) -> dict[str, np.ndarray]:
    """Seconds [repeats, phases] of each run, all of them in each turn."""
    for run in runs.values():
        run(0)
    rng = np.random.default_rng(0)
    seconds = {name: np.zeros((repeats, phases)) for name in runs}
    for turn in np.ndindex(repeats, phases):
        for name in rng.permutation([*runs]):
            seconds[name][turn] = runs[name](turn[1])
    return seconds


def compared(seconds: Mapping[str, np.ndarray], name: str, base: str) -> tuple[float, ...]:
    """Seconds of a step, the ratio to the base, and the least and greatest of one round."""
    mean, other = (float(np.median(seconds[one], 0).mean()) for one in (name, base))
    ratios = seconds[name].sum(1) / seconds[base].sum(1)
    return mean, mean / other, float(ratios.min()), float(ratios.max())


def times(arguments: Arguments, shape: LlamaConfig) -> Table:
    """Steps of each kind in turns."""
    batch = make_batch(shape, arguments)
    configs = {"plain": PLAIN}
    if arguments.time:
        configs |= {"nothing on": NOTHING_ON, "rotational": ROTATIONAL}
    if arguments.bfloat16:
        configs["bfloat16"] = replace(PLAIN, dtype="bfloat16")
    configs = {name: replace(one, remat=arguments.remat) for name, one in configs.items()}
    runs = {name: jax_step(config, shape, batch) for name, config in configs.items()}
    for name in runs.keys() - {"rotational"}:
        runs[name] = partial(lambda run, _: run(0), runs[name])  # always its step 0
    if arguments.torch:
        runs["torch"] = torch_step(shape, batch)
    seconds = in_turns(runs, 8, arguments.repeats)
    phases = [enabled_exits(ROTATIONAL.early_exit, shape.num_layers, t, STEPS) for t in range(8)]
    heads = {"rotational": statistics.mean(int(exits.sum()) for exits in phases)}
    columns = ("seconds", "GFLOP/s", "over plain", "from", "to", "predicted", "over predicted")
    table = Table("step", *columns, title=title(arguments, shape))
    plain = step_flops(shape, arguments, 1)
    for name in runs:
        flops = step_flops(shape, arguments, heads.get(name, 1))
        mean, *ratios = compared(seconds, name, "plain")
        cells = (mean, flops / mean / 1e9, *ratios, flops / plain, ratios[0] * plain / flops)
        formats = ("{:.3f}", "{:.0f}", *["{:.3f}"] * 5)
        table.add_row(name, *(form.format(cell) for form, cell in zip(formats, cells, strict=True)))
    return table


def compiled(config: StepConfig, shape: LlamaConfig, arguments: Workload):
    """The compiled step and the seconds that it took, tracing among them, from abstract
    arguments."""
    state = jax.eval_shape(lambda: init_state(config, stacked(Llama(shape, rngs=nnx.Rngs(0)))))
    batch = make_batch(shape, arguments)
    start = time.perf_counter()
    program = make_train_step(config).lower(state, batch).compile()
    return program, time.perf_counter() - start


def memory(arguments: Arguments, shape: LlamaConfig) -> Table:
    """Temporary memory of steps with one exit, a rotation of 8, and all of them."""
    table = Table("exits", "temporary MB", "over one exit", title=title(arguments, shape))
    first = None
    for name, config in (("one", PLAIN), ("rotational", ROTATIONAL), ("all", ALL_ON)):
        program, _ = compiled(replace(config, remat=arguments.remat), shape, arguments)
        size = program.memory_analysis().temp_size_in_bytes
        first = first or size
        table.add_row(name, f"{size / 1e6:.0f}", f"{size / first:.3f}")
    return table


def compile_times(arguments: Arguments, shape: LlamaConfig) -> Table:
    """Seconds to trace and compile the rotational step, by the number of layers: medians of 5."""
    jax.config.update("jax_enable_compilation_cache", False)
    seconds: dict[int, list[float]] = {8: [], 32: []}
    for _ in range(5):
        for layers, found in seconds.items():
            config = replace(ROTATIONAL, remat=arguments.remat)
            found.append(compiled(config, replace(shape, num_layers=layers), arguments)[1])
    what = f"compile, {arguments.shape}, remat {arguments.remat}, jax {jax.__version__}"
    table = Table("layers", "seconds", "over 8 layers", title=what)
    for layers, found in seconds.items():
        median = statistics.median(found)
        ratios = [one / first for one, first in zip(found, seconds[8], strict=True)]
        row = f"{median:.2f}", f"{statistics.median(ratios):.3f}"
        table.add_row(str(layers), *row)
    return table


def title(arguments: Workload, shape: LlamaConfig) -> str:
    """What was measured."""
    return (
        f"{arguments.shape}, {shape.num_layers} layers, batch {arguments.batch_size} x "
        f"{arguments.seq_len}, remat {arguments.remat}, jax {jax.__version__}"
    )


def main(arguments: Arguments) -> None:
    """Measures and prints what was asked for."""
    exact_products()
    if arguments.keep_freed_memory:
        keep_freed_memory()
    shape, console = shape_of(arguments), Console(width=110)
    if arguments.time or arguments.torch or arguments.bfloat16:
        console.print(times(arguments, shape))
    if arguments.memory:
        console.print(memory(arguments, shape))
    if arguments.compile:
        console.print(compile_times(arguments, shape))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
