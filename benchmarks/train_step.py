"""Cost of a training step: LayerSkip against plain training, and plain training against torch.

    python benchmarks/train_step.py --shape smollm2
    python benchmarks/train_step.py --shape small_vocab --batch-size 8
    python benchmarks/train_step.py --shape small_vocab --kinds plain rotational all --compile
    python benchmarks/train_step.py --batch-size 16 --seq-len 128 --kinds plain gather
    python benchmarks/train_step.py --kinds plain torch       # extra: peers

Parameters and tokens are random, in float32 on CPUs. Steps run in turns, in a random order per
turn, so no step always follows the same one:

    plain       loss of the last exit, AdamW
    nothing-on  rising layer dropout and gradual exits, before either takes effect
    rotational  R = 8, p_max = 0.1, one step of each of the 8 phases
    all         every exit
    bfloat16    plain, computed in bfloat16
    gather      p(l) = p_max l / (L - 1), layers are computed only for rows that keep them
    mask        the same rates, layers are computed for all rows
    torch       plain, transformers' Llama in eager torch

`predicted` is the ratio of FLOPs. A token costs 2 for each parameter of its layers and heads.
Attention adds 4 T N H in each layer. Forward and backward cost 3 times that. Seconds are medians
over repeats, averaged over the 8 phases. `from` and `to` are the lowest and highest ratio of a
single repeat.
"""

import os
import statistics
import time
from dataclasses import dataclass, replace
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
from lsjax.training.early_exit import exit_counts
from lsjax.training.kept_rows import keep_counted
from lsjax.training.layer_dropout import drop_rates
from lsjax.training.step import init_state, make_train_step

Kind = Literal["plain", "nothing-on", "rotational", "all", "bfloat16", "gather", "mask", "torch"]
STEPS, PHASES = 80, 8
PAUSE = 0.5  # seconds before each step, for the other library's threads to go to sleep


@dataclass(frozen=True)
class Arguments:
    """Cost of a training step."""

    shape: Literal["smollm2", "small_vocab"] = "small_vocab"
    """SmolLM2-135M, or 16 layers of width 512 with a vocabulary of 512."""
    batch_size: int = 4
    """Rows."""
    seq_len: int = 256
    """Tokens per row."""
    layers: int | None = None
    """Number of layers; by default the shape's."""
    remat: str = "none"
    """Activations that layers keep for the backward pass."""
    kinds: tuple[Kind, ...] = ("plain", "nothing-on", "rotational")
    """Steps to compare. Ratios are relative to the first one."""
    p_max: float = 0.8
    """Rate of the last layer, for gather and mask."""
    repeats: int = 3
    """Rounds of 8 steps of each kind."""
    keep_freed_memory: bool = True
    """Keeps freed memory as train.py does, also for torch."""
    compile: bool = False
    """Only compiles: shows temporary memory, and the time to trace and compile."""

    @property
    def model(self) -> LlamaConfig:
        """The model's shape."""
        changes = {} if self.layers is None else {"num_layers": self.layers}
        if self.shape == "smollm2":
            return LlamaConfig.smollm2_135m(**changes)
        small = dict(vocab_size=512, hidden_size=512, intermediate_size=1_408, num_layers=16)
        heads = dict(num_heads=8, num_kv_heads=4, head_dim=64, init_std=0.02, tie_embeddings=True)
        return LlamaConfig.tiny(**(small | heads | changes))

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """Random tokens, one document per row, every token labelled."""
        rows, steps = self.batch_size, self.seq_len
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.model.vocab_size, (rows, steps + 1), dtype=np.int32)
        return dict(
            tokens_BT=tokens[:, :-1],
            labels_BT=tokens[:, 1:],
            segments_BT=np.ones((rows, steps), np.int32),
            positions_BT=np.broadcast_to(np.arange(steps, dtype=np.int32), (rows, steps)),
        )

    def step(self, kind: Kind) -> StepConfig:
        """The configuration of a kind of step."""
        dropout, early_exit, dtype = LayerDropoutConfig(), EarlyExitConfig(), "float32"
        match kind:
            case "nothing-on":
                dropout = LayerDropoutConfig(p_max=0.1, schedule="exponential")
                early_exit = EarlyExitConfig(curriculum="gradual")
            case "rotational":
                dropout = LayerDropoutConfig(p_max=0.1)
                early_exit = EarlyExitConfig(curriculum="rotational", rotation=PHASES, e_scale=0.2)
            case "all":
                early_exit = EarlyExitConfig(curriculum="all")
            case "gather" | "mask":
                dropout = LayerDropoutConfig(p_max=self.p_max, distribution="linear", skip=kind)
            case "bfloat16":
                dtype = "bfloat16"
        return StepConfig(
            num_steps=STEPS,
            layer_dropout=dropout,
            early_exit=early_exit,
            dtype=dtype,
            remat=self.remat,
        )

    def flops(self, kind: Kind) -> float:
        """FLOPs of a step, averaged over the 8 phases."""
        shape, config = self.model, self.step(kind)
        heads, layers = 1.0, 1.0
        if kind in ("rotational", "all"):
            exits = exit_counts(config.early_exit, shape.num_layers, STEPS)[:PHASES]
            heads = 1 + float(np.mean(exits))
        if kind == "gather":
            rates_L = drop_rates(config.layer_dropout, shape.num_layers, 0, STEPS)
            rows_SR = jnp.arange(self.batch_size)[None]
            kept = [keep_counted(rates_L, config.seed, t, rows_SR)[0] for t in range(PHASES)]
            layers = float(np.mean(kept))
        attention = 4 * self.seq_len * shape.num_heads * shape.head_dim
        layer = 2 * shape.layer_params + attention
        tokens = self.batch_size * self.seq_len
        return 3 * tokens * (layers * shape.num_layers * layer + 2 * heads * shape.head_params)

    @property
    def title(self) -> str:
        """Title of the table: shape, size and versions."""
        size = f"{self.model.num_layers} layers, batch {self.batch_size} x {self.seq_len}"
        return f"{self.shape}, {size}, remat {self.remat}, jax {jax.__version__}"


def jax_step(arguments: Arguments, kind: Kind):
    """A function that runs the step of this number and returns its seconds."""
    config = arguments.step(kind)
    model = jax.jit(lambda: stacked(Llama(arguments.model, rngs=nnx.Rngs(0))))()
    state, step, batch = init_state(config, model), make_train_step(config), arguments.batch

    def run(number: int) -> float:
        nonlocal state
        time.sleep(PAUSE)
        state = replace(state, step=jnp.int32(0 if kind == "nothing-on" else number))
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


def torch_step(arguments: Arguments):
    """`jax_step` for transformers' Llama in eager torch, with fused attention."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape, batch = arguments.model, arguments.batch
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


def times(arguments: Arguments) -> Table:
    """Times steps of each kind in turns."""
    runs = {
        kind: torch_step(arguments) if kind == "torch" else jax_step(arguments, kind)
        for kind in arguments.kinds
    }
    for run in runs.values():
        run(0)
    rng = np.random.default_rng(0)
    seconds = {kind: np.zeros((arguments.repeats, PHASES)) for kind in runs}
    for turn in np.ndindex(arguments.repeats, PHASES):
        for index in rng.permutation(len(runs)):
            kind = arguments.kinds[index]
            seconds[kind][turn] = runs[kind](turn[1])
    first = arguments.kinds[0]
    columns = ("seconds", "GFLOP/s", f"over {first}", "from", "to", "predicted", "over predicted")
    table = Table("step", *columns, title=arguments.title)
    mean = {kind: float(np.median(seconds[kind], 0).mean()) for kind in runs}
    for kind in runs:
        flops = arguments.flops(kind)
        predicted, ratio = flops / arguments.flops(first), mean[kind] / mean[first]
        rounds = seconds[kind].sum(1) / seconds[first].sum(1)
        cells = (ratio, rounds.min(), rounds.max(), predicted, ratio / predicted)
        row = (f"{mean[kind]:.3f}", f"{flops / mean[kind] / 1e9:.0f}")
        table.add_row(kind, *row, *(f"{cell:.3f}" for cell in cells))
    return table


def programs(arguments: Arguments) -> Table:
    """Temporary memory of the compiled steps, and median seconds to trace and compile them."""
    jax.config.update("jax_enable_compilation_cache", False)
    columns = ("temporary MB", "over the first", "seconds to trace and compile")
    table = Table("step", *columns, title=arguments.title)
    first = None
    for kind in arguments.kinds:
        config, seconds = arguments.step(kind), []
        state = jax.eval_shape(
            lambda config=config: init_state(
                config, stacked(Llama(arguments.model, rngs=nnx.Rngs(0)))
            )
        )
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            program = make_train_step(config).lower(state, arguments.batch).compile()
            seconds.append(time.perf_counter() - start)
        size = program.memory_analysis().temp_size_in_bytes
        first = first or size
        median = statistics.median(seconds)
        table.add_row(kind, f"{size / 1e6:.0f}", f"{size / first:.3f}", f"{median:.2f}")
    return table


def main(arguments: Arguments) -> None:
    """Measures and prints a table."""
    exact_products()
    if arguments.keep_freed_memory:
        keep_freed_memory()
    Console(width=110).print((programs if arguments.compile else times)(arguments))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
