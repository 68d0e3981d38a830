"""Mesh of devices, and sharding of arrays over it.

The mesh has four axes (any of them may be 1):

    data     shards the rows of a batch
    fsdp     shards the weights along D, and in training the rows too
    context  shards the positions of a row in training (`in_context_order`)
    tensor   shards the weights along K (heads), F and V, the cache along K, the logits along V

Training has many rows, so each layer's weights are gathered along fsdp when the layer runs
(Rajbhandari et al., 2020). Decoding has few rows: the weights stay, and each device multiplies its
share of D.

If a mesh axis does not divide an array's axis, the array is replicated over it. Some weights have
another candidate before that (lsjax/model/parameters.py). If there are fewer K/V heads than
devices, qkv is sharded along D. Heads, cache and attention are then replicated over the tensor
axis. A table whose vocabulary does not divide is sharded along D too.
"""

import hashlib
import math
import os
import platform as python_platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from lsjax.config import MeshConfig, as_path, check

# The axes that shard the rows of a batch in training, and pieces of rows.
ROWS = ("data", "fsdp")
PIECES = ("context", *ROWS)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of this config on the first devices, for `jax.set_mesh`.

    Slices are outermost on the data axis, so only sums over rows are sent between them. Devices
    other than TPUs are split evenly into slices, in order. devices: all by default. Raises
    ConfigError if the mesh does not fit them, or leaves devices idle in a run with several hosts.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = config.sizes(len(devices)), config.slices
    size = math.prod(sizes.values())
    if devices[0].platform == "tpu":
        numbers = [getattr(device, "slice_index", 0) for device in devices]
        devices = [devices[index] for index in np.argsort(numbers, kind="stable")]
        found = len(set(numbers))
        check(
            found == slices,
            f"mesh.slices is {slices}, but the devices are in {found}: set it to {found}",
        )
    check(
        size == len(devices) or jax.process_count() == 1,
        f"a mesh of {size} devices, but {jax.process_count()} processes have {len(devices)}: "
        "set one of --mesh.data, --mesh.fsdp and --mesh.tensor to -1, which takes the rest",
    )
    # Unlike jax.make_mesh, this may split an axis of the torus: 16 of 8 x 8.
    shape = tuple({**sizes, "data": sizes["data"] // slices}.values())
    place = partial(mesh_utils.create_device_mesh, shape, allow_split_physical_axes=True)
    firsts = range(0, len(devices), len(devices) // slices)
    places = np.concatenate([place(devices[first:][: size // slices]) for first in firsts])
    return Mesh(places, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def own_rows(rows: int, mesh: Mesh | None) -> np.ndarray:
    """Indices of the rows of a training batch on this process's devices, in order. They may be
    non-contiguous. Hosts that share rows and shard only weights have the same indices."""
    if mesh is None:
        return np.arange(rows)
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    indices = place.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[0]] for index in indices]))


def placed_rows(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh | None) -> dict[str, Any]:
    """Shards a batch of `rows` rows over the mesh; each process provides its `own_rows`."""
    if mesh is None:
        return dict(batch)
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    return {
        name: jax.make_array_from_process_local_data(place, own, (rows, *own.shape[1:]))
        for name, own in batch.items()
    }


def fitted(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec without mesh axes that do not divide the array's axes. If several mesh axes shard
    one array axis, the last ones are dropped first."""

    def fit(size, names):
        if isinstance(names, str | None):
            names = (names,) if names else ()
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names if len(names) > 1 else next(iter(names), None)

    fits = [fit(size, names) for size, names in zip(shape, spec, strict=False)]
    return P(*fits)


def constrain(x: Array, *spec: str | tuple[str, ...] | None) -> Array:
    """Shards x over these axes of the current mesh, axis by axis, if they divide. Other axes are
    replicated. Without a mesh x is unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, fitted(P(*spec), x.shape, mesh))


def machine() -> str:
    """Hash of the kind of processor and the number of usable cores."""
    try:
        lines = as_path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name {python_platform.platform()} {python_platform.processor()}"]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256("\n".join([*kind, str(cores)]).encode()).hexdigest()[:12]


def chunk_steps(batch: int, steps: int, vocab: int, logits: int) -> int:
    """C: positions of each row in a chunk. Each device of the current mesh then holds at most
    `logits` logits at a time. Chunks are about equal."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    most = max(1, min(steps, logits * devices // (batch * vocab)))
    return -(-steps // -(-steps // most))


def split_rows(tree: Any, parts: int) -> Any:
    """Splits arrays of rows [B, ...] into parts [M, B / M, ...], for a scan. Part m has the rows m,
    M + m, 2 M + m ..., so each device has its share of every part."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def row_shards(rows: int) -> int:
    """Number of shards of a training batch of that many rows, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    place = NamedSharding(mesh, fitted(P(ROWS), (rows,), mesh))
    return rows // place.shard_shape((rows,))[0]


def context_shards() -> int:
    """Number of shards of a row's positions in training, on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def in_context_order(x: Any, *, back: bool = False) -> Any:
    """Rows [B, T, ...] with their columns in the order in which P context shards hold them.

    Shard i holds chunks i and 2 P - 1 - i of 2 P. So each shard's queries see equally many keys, up
    to their own chunk: causal attention takes equally long on each. back: the inverse.
    """
    shards = context_shards()
    if shards == 1:
        return x
    first = np.arange(shards)
    order = np.stack([first, 2 * shards - 1 - first], 1).ravel()
    chunks = x.reshape(len(x), 2 * shards, -1, *x.shape[2:])
    return chunks[:, np.argsort(order) if back else order].reshape(x.shape)


def over_context(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch of training rows in context order, sharded over the current mesh."""
    return {name: constrain(in_context_order(x), ROWS, "context") for name, x in batch.items()}


def pieces(x: Array) -> Array:
    """Rows in context order, [B, T, ...], as rows of their own for each of P context shards,
    [P B, T / P, ...]. Each device keeps its elements."""
    shards = context_shards()
    if shards == 1:
        return x
    x = x.reshape(len(x), shards, -1, *x.shape[2:]).swapaxes(0, 1)
    return constrain(x.reshape(-1, *x.shape[2:]), PIECES)


def on_each_device(
    function: Callable,
    arguments: Sequence[Any],
    specs: Sequence[P],
    outputs: Any,
    axes: Sequence[str] | None = None,
) -> Any:
    """Runs `function(*arguments)` on each device's own shard; the plain call without a mesh.

    It serves functions that are independent along the sharded axes, or communicate themselves, if
    the compiler cannot infer this. specs: sharding of all arrays in each argument. A mesh axis that
    does not divide one of the arrays is dropped for all of them. axes: mesh axes, all by default;
    the compiler shards over the others.
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

    def without(spec):
        kept = [None if name in left_out else name for name in spec]
        return P(*kept)

    specs, outputs = jax.tree.map(without, (tuple(specs), outputs))
    names = {*(axes or mesh.axis_names)}
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=outputs, axis_names=names, check_vma=False
    )
    return mapped(*arguments)
