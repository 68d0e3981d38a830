"""The mesh of devices, and how arrays are constrained to it.

The mesh has three axes (any of them may be 1):

    data    shards the rows of a batch
    fsdp    shards the weights along D, and in training the rows too
    tensor  shards the weights along K (heads), F and V, the cache along K, the logits along V

Training has many rows, so each layer's weights are gathered along fsdp when the layer runs
(Rajbhandari et al., 2020). Decoding has few rows: the weights stay, and each device multiplies its
share of D.

An axis of the mesh that does not divide an array's axis leaves it replicated. Of two axes for one
size the first one stays, if it divides. Some weights have a second choice before that
(lsjax/model/parameters.py): qkv is sharded along D where the K/V heads are fewer than the devices.
The heads, their cache and the attention itself are then replicated over the tensor axis. A table
whose vocabulary does not divide is sharded along D likewise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lsjax.config import MeshConfig, check

# The axes that shard the rows of a batch in training.
ROWS = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of this config on the first devices, for `jax.set_mesh`.

    devices: all by default. Raises ConfigError where it does not fit them, or leaves devices of
    several hosts idle.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    used = devices[: math.prod(sizes.values())]
    check(
        len(used) == len(devices) or jax.process_count() == 1,
        f"a mesh of {len(used)} devices, but {jax.process_count()} processes have {len(devices)}: "
        "set one of --mesh.data, --mesh.fsdp and --mesh.tensor to -1, which takes what is left",
    )
    # Unlike jax.make_mesh, also where an axis takes a part of the torus's: 16 of 8 x 8.
    places = mesh_utils.create_device_mesh(
        tuple(sizes.values()), used, allow_split_physical_axes=True
    )
    return Mesh(places, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def own_rows(rows: int, mesh: Mesh | None) -> np.ndarray:
    """Numbers of the rows of a training batch on this process's devices, in order.

    They need not be neighbours. Hosts between which only weights are sharded have the same rows.
    """
    numbers_B = np.arange(rows)
    if mesh is None:
        return numbers_B
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    indices = place.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([numbers_B[index[0]] for index in indices]))


def placed_rows(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh | None) -> dict[str, Any]:
    """A batch of so many rows, of which each process gives its `own_rows`, sharded on the mesh."""
    if mesh is None:
        return dict(batch)
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    return {
        name: jax.make_array_from_process_local_data(place, own, (rows, *own.shape[1:]))
        for name, own in batch.items()
    }


def fitted(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec without the axes of the mesh that do not divide the array's.

    Of several for one axis the first ones stay.
    """

    def fit(size, names):
        if isinstance(names, str | None):
            names = (names,) if names else ()
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names if len(names) > 1 else next(iter(names), None)

    return P(*[fit(size, names) for size, names in zip(shape, spec, strict=False)])


def constrain(x: Array, *spec: str | tuple[str, ...] | None) -> Array:
    """Shards x over these axes of the mesh in use, axis by axis, where they divide.

    Other axes are replicated. Without a mesh x stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, fitted(P(*spec), x.shape, mesh))


def platform() -> str:
    """Platform of the program that is being traced: "cpu", "gpu" or "tpu".

    It is that of the mesh in use, whose devices may be abstract, or else of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def chunk_steps(batch: int, steps: int, vocab: int, logits: int) -> int:
    """C: positions of each row in a chunk, so that each device of the mesh in use holds no more
    than so many logits at a time; chunks are about equal."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    most = max(1, min(steps, logits * devices // (batch * vocab)))
    return -(-steps // -(-steps // most))


def split_rows(tree: Any, parts: int) -> Any:
    """Arrays of rows [B, ...] as parts of them [M, B / M, ...], for a scan.

    Part m takes the rows m, M + m, 2 M + m ...: each device then has its share of every part.
    """

    def split(array: Array) -> Array:
        return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def row_shards(rows: int) -> int:
    """Parts of a batch of that many rows that training has on different devices of the mesh in
    use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    return rows // place.shard_shape((rows,))[0]


def on_each_device(
    function: Callable,
    arguments: Sequence[Any],
    specs: Sequence[P],
    outputs: Any,
    axes: Sequence[str] | None = None,
) -> Any:
    """`function(*arguments)`, by each device on its own shard and without communication.

    Without a mesh it is the plain call. It serves functions that the compiler does not see to be
    independent along the sharded axes.

    Args:
        specs: of all the arrays in each argument. An axis of the mesh that does not divide one of
            the arrays is left out for all of them.
        axes: of the mesh, all by default; sharding over the others stays with the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arguments)
    left_out = {
        name
        for spec, argument in zip(specs, arguments, strict=True)
        for array in jax.tree.leaves(argument)
        for name, kept in zip(spec, fitted(spec, array.shape, mesh), strict=True)
        if name != kept
    }
    specs, outputs = jax.tree.map(
        lambda spec: P(*[None if name in left_out else name for name in spec]),
        (tuple(specs), outputs),
        is_leaf=lambda spec: isinstance(spec, P),
    )
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=outputs,
        axis_names={*(mesh.axis_names if axes is None else axes)},
        check_vma=False,
    )
    return mapped(*arguments)
