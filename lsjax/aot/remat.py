"""Chooses the remat policy "auto": the fastest that fits, by compiling the step with each policy.

The loop of training/ sees only the choice. It knows nothing of this package.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from lsjax.aot.chips import CHIPS, GIB, Chip
from lsjax.aot.programs import program_reports, sizes_by_slice, train_step
from lsjax.config import ConfigError, MeshConfig, TrainConfig
from lsjax.sharding import make_mesh
from lsjax.training.prepare import TrainingRun
from lsjax.training.recipe import PAPER, Recipe

AUTO = "auto"
# Policies that are compiled, from the least recomputation to the least memory.
CANDIDATES = (
    "none",
    "dots_with_no_batch_dims_saveable",
    "attention",
    "attention_output",
    "nothing_saveable",
)


def with_remat(run: TrainingRun, say: Callable[[str], None]) -> TrainingRun:
    """The run with its policy chosen for the devices of this machine. CPUs keep everything, and
    nothing is compiled. say: called with a line for each policy. Raises ConfigError if none fits.
    """
    config = run.config
    if config.remat != AUTO:
        return run
    if jax.default_backend() == "cpu":
        return replace(run, config=replace(config, remat="none"))
    mesh = run.mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return replace(run, config=fastest(config, mesh, local_chip(), say, run.recipe))


def local_chip() -> Chip:
    """The chip of this machine, with the memory that JAX may use. An unknown one gets the speed of
    the platform's first chip in CHIPS. That suffices to compare policies."""
    device = jax.local_devices()[0]
    platform = "tpu" if device.platform == "tpu" else "cuda"
    chips = [chip for chip in CHIPS if chip.platform == platform]
    known = [chip for chip in chips if device.device_kind.startswith(chip.kind)]
    chip = (known or chips)[0]
    return replace(chip, hbm=(device.memory_stats() or {}).get("bytes_limit", chip.hbm))


def fastest(
    config: TrainConfig,
    mesh: Mesh,
    chip: Chip,
    say: Callable[[str], None],
    recipe: Recipe = PAPER,
) -> TrainConfig:
    """The config with the policy whose step takes least time without overlap, of those that fit.

    Compiling may take minutes for each of CANDIDATES. Raises ConfigError if none fits.
    """
    found: dict[float, TrainConfig] = {}
    sizes = sizes_by_slice(mesh)
    for policy in CANDIDATES:
        given = replace(config, remat=policy)
        lowered, trips = train_step(given, mesh, recipe)
        (report,) = program_reports("train", lowered, [(None, trips)], chip, sizes)
        if report["too_large"]:
            say(f"remat {policy}: too large")
            continue
        seconds, total = report["serial_seconds"], report["memory"]["total"]
        say(
            f"remat {policy}: {total / GIB:.1f} of {chip.hbm / GIB:.1f} GiB, {seconds:.3f} s a step"
        )
        found[seconds] = given
    if not found:
        raise ConfigError(
            f"no remat policy fits {chip.name}: {report['too_large']} with {policy}; raise "
            "micro_batches or mesh.fsdp"
        )
    return found[min(found)]
