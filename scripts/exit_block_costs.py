"""What a training step of exit blocks costs, in forward passes of the model. Compiles for slices.

    python scripts/exit_block_costs.py --topology v5p:4x4x4 --rows 256 --fsdp 16 --micro-batches 2
    python scripts/exit_block_costs.py --topology h100:8 --rows 32 --fsdp 8

The shape is Llama-3 8B's. A forward pass has the head, in chunks, and no gradient. Needs the chip's
compiler, as `lsjax aot` does.
"""

import math
import runpy
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from jax.stages import Lowered

from lsjax.aot import programs
from lsjax.aot.chips import GIB, slice_of
from lsjax.aot.costs import Trips
from lsjax.config import (
    EarlyExitConfig,
    ExitBlocksConfig,
    LayerDropoutConfig,
    MeshConfig,
    TrainConfig,
)
from lsjax.kernels.loss_chunks import loss_chunk
from lsjax.model.matrices import cast_matrices
from lsjax.platforms import with_kernels
from lsjax.rollouts.log_probs import states_after
from lsjax.sharding import PIECES, make_mesh, on_each_device, split_rows
from lsjax.training.early_exit import log_z
from lsjax.training.head_loss import CHUNKS
from lsjax.training.step import abstract_state


@dataclass(frozen=True)
class Arguments:
    """What to compile."""

    topology: str
    """Chip and slice."""
    rows: int
    """Rows of a step."""
    fsdp: int
    """Devices that share the weights."""
    micro_batches: int = 1
    """Parts of a step."""
    length: int = 8_192
    """Tokens of a row."""
    exits: tuple[int, ...] = (4, 8)
    """Exits of one block, and of two."""


def main(arguments: Arguments) -> None:
    """Prints seconds, forward passes and memory of each step."""
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed
    jax.config.update("jax_enable_compilation_cache", False)
    config = replace(
        runpy.run_path("configs/continual_llama3_8b.py")["config"],
        batch_size=arguments.rows,
        seq_len=arguments.length,
        micro_batches=arguments.micro_batches,
        mesh=MeshConfig(data=-1, fsdp=arguments.fsdp),
        layer_dropout=LayerDropoutConfig(),
        early_exit=EarlyExitConfig(),
        remat="nothing_saveable",
        dtype="bfloat16",
    )
    chip, devices = slice_of(arguments.topology, 1)
    mesh = make_mesh(config.mesh, devices)
    few = config.model.vocab_size // 8
    steps = {"forward": forward(config, mesh)}
    for name, vocab in (("", None), (", vocabulary V/8", few)):
        for count in range(1, 1 + len(arguments.exits)):
            blocks = ExitBlocksConfig(exits=arguments.exits[:count], draft_vocab=vocab)
            own = replace(config, exit_blocks=blocks)
            steps[f"{count} block{'s' * (count > 1)}{name}"] = programs.train_step(own, mesh)
    base = None
    for name, (lowered, trips) in steps.items():
        sizes = programs.sizes_by_slice(mesh)
        (found,) = programs.program_reports(name, lowered, [(None, trips)], chip, sizes)
        base = base or found["seconds"]
        memory = found["memory"]["total"] / GIB if found["memory"] else math.nan
        ratio = found["seconds"] / base
        print(f"{name}: {found['seconds']:.4f} s, {ratio:.2f} forward passes, {memory:.1f} GiB")


def forward(config: TrainConfig, mesh: Mesh) -> tuple[Lowered, Trips]:
    """One forward pass of a step's rows, with the logits' normaliser, and the trips of its loop."""
    table = config.model.vocab_size, config.model.hidden_size
    with jax.set_mesh(mesh), with_kernels(config.kernels):  # a chunk's size depends on both
        chunk = loss_chunk(config.batch_size // config.micro_batches, config.seq_len, table)
    chunks = math.ceil(config.seq_len / chunk)

    def of_rows(norm, table_VD, x_BTD):
        def add(index, total):
            x_BCD = norm(lax.dynamic_slice_in_dim(x_BTD, index * chunk, chunk, 1))
            wide = dict(preferred_element_type=jnp.float32)
            return total + log_z(jnp.einsum("BCD,VD->BCV", x_BCD, table_VD, **wide)).sum()

        with jax.named_scope(CHUNKS):
            return lax.fori_loop(0, chunks, add, jnp.float32(0))[None]

    def run(model, batch):
        model = cast_matrices(model, config.dtype)

        def part(batch):
            x_BTD = states_after(model, batch, [config.model.num_layers])[-1]
            given = model.norm, model.head_table.astype(x_BTD.dtype), x_BTD
            return on_each_device(of_rows, given, (P(), P(), P(PIECES)), P(PIECES), axes=PIECES)

        return lax.map(part, split_rows(batch, config.micro_batches)).sum()

    state, batch = abstract_state(config, mesh), programs.batch_shapes(config, mesh)
    with jax.set_mesh(mesh), with_kernels(config.kernels):
        return jax.jit(run).lower(state.model, batch), {rf"/{CHUNKS}/while$": chunks}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
