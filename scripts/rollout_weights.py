"""What is copied when a trainer's weights become those of its rollouts, on the same devices.

    python scripts/rollout_weights.py --topology h100:8
    python scripts/rollout_weights.py --topology v5p:2x2x4

The shape is Llama-3 8B's, in bfloat16. The trainer shards stacked layers over all devices (fsdp).
Rollouts have a slice for each layer: sharded as before, or over heads and channels (tensor). Needs
the chip's compiler, as `lsjax aot` does.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import Mesh

import lsjax
from lsjax.aot import programs
from lsjax.aot.chips import slice_of
from lsjax.config import LlamaConfig, MeshConfig
from lsjax.model.llama import stacked, unstacked
from lsjax.model.parameters import placed_shapes, shardings
from lsjax.sharding import make_mesh

GB = 1e9


@dataclass(frozen=True)
class Arguments:
    """Where to compile for."""

    topology: str
    """Chip and slice."""


def main(arguments: Arguments) -> None:
    """Prints bytes of each way."""
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed
    jax.config.update("jax_enable_compilation_cache", False)
    chip, devices = slice_of(arguments.topology)
    config = LlamaConfig.llama3_8b()
    policy = jax.eval_shape(
        lambda: stacked(lsjax.Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(policy))
    trainer = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    print(f"weights: {size / GB:.1f} GB, {size / len(devices) / GB:.2f} GB on each device")
    for name, mesh in (
        ("sharded as in training", trainer),
        ("sharded over heads and channels", make_mesh(MeshConfig(tensor=len(devices)), devices)),
    ):
        found = figures(policy, trainer, mesh, chip)
        print(
            f"{name}: each device reads and writes {found['moved_bytes'] / GB:.2f} GB of its "
            f"memory and sends {found['sent_bytes'] / GB:.2f} GB, {1e3 * found['seconds']:.1f} ms"
        )


def figures(policy: lsjax.Llama, trainer: Mesh, rollouts: Mesh, chip) -> dict:
    """Costs of the program that makes the rollouts' weights."""
    given = placed_shapes(policy, trainer)
    places = shardings(jax.eval_shape(unstacked, policy), rollouts)
    lowered = jax.jit(unstacked, out_shardings=places).lower(given)
    sizes = programs.sizes_by_slice(trainer)
    (found,) = programs.program_reports("weights", lowered, [(None, {})], chip, sizes)
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments))
