"""Attention is chosen by the devices of the program, which need not be there."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

from lsjax.aot.chips import CHIPS, slice_of
from lsjax.aot.hlo import attention_kernel, parse, runs
from lsjax.config import MeshConfig
from lsjax.kernels import self_attention as module
from lsjax.kernels.flash_decoding import flash_decoding
from lsjax.model.attention import self_attention
from lsjax.model.block import _attend
from lsjax.sharding import make_mesh
from tests.marks import with_extra

NAMES = ("data", "fsdp", "tensor")


def mesh_of(kind: str, platform: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    types = (AxisType.Auto,) * len(NAMES)
    return AbstractMesh((1, 1, 1), NAMES, axis_types=types, abstract_device=device)


@pytest.mark.parametrize(
    "kind, expected",
    [("NVIDIA H100", 9.0), ("NVIDIA A100-SXM4-80GB", 8.0), ("Tesla V100-SXM2-16GB", 0.0)],
)
def test_devices_that_are_not_here(kind, expected):
    with jax.sharding.use_abstract_mesh(mesh_of(kind, "gpu")):
        assert module.nvidia_capability() == expected


class Local:
    """A card of this machine."""

    def __init__(self, kind: str, capability: str):
        self.device_kind, self.compute_capability = kind, capability


@pytest.mark.parametrize("capability, expected", [("7.5", 7.5), ("12.0", 12.0), ("gfx90a", 0.0)])
def test_local_devices_know_it_themselves(monkeypatch, capability, expected):
    monkeypatch.setattr(jax, "local_devices", lambda: [Local("Card", capability)])
    assert module.nvidia_capability() == expected
    # On the same card, by its name in a mesh; not for a TPU elsewhere.
    with jax.sharding.use_abstract_mesh(mesh_of("Card", "gpu")):
        assert module.nvidia_capability() == expected
    with jax.sharding.use_abstract_mesh(mesh_of("TPU v5", "tpu")):
        assert module.nvidia_capability() == 0


def test_cpus_have_none():
    assert module.nvidia_capability() == 0


def test_all_gpus_of_the_table_have_it():
    for chip in CHIPS:
        if chip.platform == "cuda":
            with jax.sharding.use_abstract_mesh(mesh_of(chip.kind, "gpu")):
                assert module.nvidia_capability() >= 8


@pytest.mark.parametrize(
    "kind, problem",
    [("NVIDIA H100", None), ("Tesla V100-SXM2-16GB", "is for NVIDIA GPUs since Ampere")],
)
def test_cudnn_where_the_card_takes_it(kind, problem):
    with jax.sharding.use_abstract_mesh(mesh_of(kind, "gpu")):
        found = module._problem("cudnn", jnp.zeros((2, 4, 2, 8), jnp.bfloat16))
    assert found is None if problem is None else problem in found


@pytest.fixture
def uncached():
    """Without a card jax can write programs for it to the cache, but not read them."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    reset_cache()


WITH_CUDA = with_extra("cuda")


@WITH_CUDA
@pytest.mark.parametrize("size", [64, 128])
def test_packed_rows_on_gpus_need_no_mask(uncached, size):
    """The backward pass, with grouped heads, takes less than a mask of [T, T] alone would."""
    steps, (_, devices) = 4096, slice_of("h100:1")
    mesh = make_mesh(MeshConfig(), devices)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    def backward(q, k, v, segments, dy):
        return jax.vjp(lambda *qkv: self_attention(*qkv, segments), q, k, v)[1](dy)

    q, k = shape(1, steps, 4, size), shape(1, steps, 2, size)
    # As in the program, where products of bfloat16 are bfloat16's.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        lowered = jax.jit(backward).lower(q, k, k, shape(1, steps, dtype=jnp.int32), q)
        compiled = lowered.compile()
    assert "flash_dkv/pallas_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < steps * steps


@WITH_CUDA
@pytest.mark.parametrize("steps, heads, size", [(1, 8, 64), (5, 8, 128), (13, 4, 64)])
def test_decoding_on_gpus_is_few_kernels(uncached, steps, heads, size):
    """New tokens are laid out, one kernel attends and writes in place, its parts are added up."""
    _, devices = slice_of("h100:1")
    mesh = make_mesh(MeshConfig(), devices)
    place = NamedSharding(mesh, P())
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (
            ((2, steps, heads, size), jnp.bfloat16),
            *[((2, steps, 2, size), jnp.bfloat16)] * 2,
            *[((2, 2, 2112, size), jnp.bfloat16)] * 2,
            ((2,), jnp.int32),
        )
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(flash_decoding, donate_argnums=(3, 4)).lower(*given).compile()
    program = parse(compiled.as_text())
    assert sum(map(runs, program[-1].instructions.values())) <= 4
    caches = 2 * 2 * 2 * 2112 * size * 2
    assert compiled.memory_analysis().alias_size_in_bytes == caches
    assert compiled.memory_analysis().temp_size_in_bytes < caches


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5p:2x2x1", marks=with_extra("tpu")),
        pytest.param("h100:1", marks=WITH_CUDA),
    ],
)
def test_prompts_on_accelerators_keep_no_scores(uncached, topology):
    """Scores in float32 would take 4 bytes for each query, slot and head."""
    steps, heads, slots, (_, devices) = 512, 8, 2112, slice_of(topology)
    mesh = make_mesh(MeshConfig(), devices[:1])
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in (
            ((1, steps, heads, 128), jnp.bfloat16),
            *[((1, steps, 2, 128), jnp.bfloat16)] * 2,
            *[((1, 2, slots, 128), jnp.bfloat16)] * 2,
            ((1, steps), jnp.int32),
        )
    ]
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(partial(_attend, None), donate_argnums=(3, 4)).lower(*given).compile()
    assert attention_kernel([program.as_text()]) == "flash prefill"
    assert program.memory_analysis().temp_size_in_bytes < 4 * steps * slots * heads / 8
