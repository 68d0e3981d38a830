"""Takes the same training steps on one device, on meshes, and on two processes connected over
loopback. Also saves a run on one layout and restores it on another.

    python scripts/proofs/meshes.py --directory /tmp/meshes

Prints differences from one device: the relative one of a step's float32 gradient, and that of the
float64 parameters after ten steps. Layer dropout uses masks, which are equal on every mesh.
Restored arrays must equal the saved ones, bit for bit. Exits with 1 if a check fails.
"""

import os
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lsjax.config import MeshConfig

CONFIG = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))["config"]
STEPS = 10
MOST_F32, MOST_F64 = 1e-5, 1e-9


@dataclass(frozen=True)
class Case:
    """A layout of devices and processes."""

    name: str
    mesh: MeshConfig
    devices: int = 8  # of each process
    processes: int = 1


ONE = Case("1 device", MeshConfig(), devices=1)
TWO_PROCESSES = Case("2 processes x 4, fsdp 8", MeshConfig(fsdp=8), 4, 2)
CASES = (
    ONE,
    Case("data 2 x fsdp 2", MeshConfig(data=2, fsdp=2)),
    Case("data 4 x fsdp 2", MeshConfig(data=4, fsdp=2)),
    Case("data 4 x tensor 2", MeshConfig(data=4, tensor=2)),
    Case("data 2 x fsdp 2 x tensor 2", MeshConfig(data=2, fsdp=2, tensor=2)),
    Case("fsdp 2 x context 4", MeshConfig(fsdp=2, context=4)),
    TWO_PROCESSES,
    Case("2 processes x 4, tensor 2 x fsdp 4", MeshConfig(fsdp=4, tensor=2), 4, 2),
)


def main(directory: Path) -> None:
    """Prints both results; exits with 1 if a check fails."""
    directory.mkdir(parents=True, exist_ok=True)
    good = same_steps(directory)
    good &= same_after_restoring(directory)
    sys.exit(0 if good else 1)


def same_steps(directory: Path) -> bool:
    """Prints the differences from one device; returns whether they are small enough."""
    import numpy as np

    print(f"{'':<42}{'gradient, f32':>15}{f'{STEPS} steps, f64':>15}", flush=True)
    good, first = True, None
    for index, case in enumerate(CASES):
        file = directory / f"{index}.npz"
        launch(case, "steps", directory, file)
        found = dict(np.load(file))
        first = first or found
        names = {part: [n for n in found if n.startswith(part)] for part in ("gradient", "after")}
        relative = max(
            np.linalg.norm(found[name] - first[name]) / np.linalg.norm(first[name])
            for name in names["gradient"]
        )
        apart = max(np.abs(found[name] - first[name]).max() for name in names["after"])
        assert all(first[name].dtype == np.float64 for name in names["after"])
        good &= relative <= MOST_F32 and apart <= MOST_F64
        print(f"{case.name:<42}{relative:>15.1e}{apart:>15.1e}", flush=True)
    return good


def same_after_restoring(directory: Path) -> bool:
    """Two processes save, one device restores and saves, two processes restore and save."""
    from kills import arrays

    from lsjax.checkpoints.steps import PARAMS, TRAIN, saved_steps

    a, b, c = runs = [directory / name for name in "abc"]
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    launch(TWO_PROCESSES, "save", directory, a)
    launch(ONE, "restore", a, b)
    launch(TWO_PROCESSES, "restore", b, c)
    steps = [saved_steps(run)[0] for run in runs]
    good = True
    for item in (PARAMS, TRAIN):
        first, *others = (arrays(step, item) for step in steps)
        for other in others:
            good &= first.keys() == other.keys()
            good &= all(first[name].tobytes() == other[name].tobytes() for name in first)
    there, back = f"{TWO_PROCESSES.name} -> {ONE.name}", "and back"
    print(f"{there}, {back}: {len(first)} arrays of {TRAIN} and the parameters are", end=" ")
    print("equal bit for bit" if good else "NOT EQUAL")
    return good


def launch(case: Case, task: str, source: Path, target: Path) -> None:
    """Runs a worker in each of the case's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "worker"]
            + [str(CASES.index(case)), task, str(source), str(target), str(port), str(number)],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(case.devices)}
            | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for number in range(case.processes)
    ]
    if any([worker.wait() for worker in workers]):
        raise SystemExit(f"a worker of {case.name} failed")


def worker(case: Case, task: str, source: Path, target: Path, port: int, number: int) -> None:
    """One process of a case."""
    import jax

    from lsjax.checkpoints.saving import Checkpoints
    from lsjax.cli.setup import exact_products
    from lsjax.sharding import make_mesh
    from lsjax.training.hosts import Hosts, start
    from lsjax.training.step import abstract_state, initial_state

    if case.processes > 1:
        start(Hosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number))
    exact_products()
    mesh = make_mesh(case.mesh)
    with jax.set_mesh(mesh):
        if task == "steps":
            take_steps(source, target, mesh)
            return
        like = abstract_state(CONFIG, mesh)
        if task == "save":
            state = initial_state(CONFIG, mesh, like)
            state, _ = next(iter(steps(CONFIG, state, source, mesh)))
        else:
            state = Checkpoints(source, CONFIG.checkpoints).restore(like).state
        with Checkpoints(target, CONFIG.checkpoints) as checkpoints:
            checkpoints.save(state, step=1, data={})


def take_steps(cache: Path, file: Path, mesh) -> None:
    """Writes the float32 gradient of the first step, and the float64 parameters after the last."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental.multihost_utils import process_allgather

    from lsjax.model.llama import Llama
    from lsjax.model.parameters import named_leaves, shardings
    from lsjax.training.step import init_state

    found = {}
    for dtype in (jnp.float32, jnp.float64):

        def make(dtype=dtype):
            return init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0), dtype=dtype))

        places = shardings(jax.eval_shape(make), mesh)
        first = jax.jit(make, out_shardings=places)()
        for number, (state, _) in enumerate(steps(CONFIG, first, cache, mesh), 1):
            if dtype == jnp.float32:
                # AdamW's first moment is (1 - b1) of the first gradient.
                leaves = named_leaves(state).items()
                chosen = {f"gradient {name}": leaf for name, leaf in leaves if ".mu." in name}
                break
            if number == STEPS:
                leaves = named_leaves(state.model).items()
                chosen = {f"after {name}": leaf for name, leaf in leaves}
                break
        found |= {name: process_allgather(leaf, tiled=True) for name, leaf in chosen.items()}
    if jax.process_index() == 0:
        np.savez(file, **found)


def steps(config, state, cache: Path, mesh):
    """(state, metrics) after each step."""
    from lsjax.data.pipeline import Pipeline, packed_rows
    from lsjax.data.tokenizer_backends import ByteTokenizer
    from lsjax.sharding import own_rows, placed_rows
    from lsjax.training.step import make_train_step

    pipeline = Pipeline(
        packed_rows(
            config.data, ByteTokenizer(), seq_len=config.seq_len, split="train", cache=cache
        ),
        batch_size=config.batch_size,
        seed=config.seed,
        own_B=own_rows(config.batch_size, mesh),
    )
    step = make_train_step(config)
    while True:
        state, metrics = step(state, placed_rows(pipeline.next(), config.batch_size, mesh))
        yield state, metrics


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        index, task, source, target, port, number = sys.argv[2:]
        worker(CASES[int(index)], task, Path(source), Path(target), int(port), int(number))
    else:
        tyro.cli(main, description=__doc__)
