"""Which GPU kernels fit which cards, by arithmetic. scripts/proofs/gpu_kernels.py compiles them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lsjax.config import ConfigError
from lsjax.kernels import self_attention as attention
from lsjax.kernels.flash_decoding import fits
from lsjax.kernels.shared_memory import decoding_bytes, decoding_stages, training_bytes
from lsjax.model.attention import self_attention

CARDS = {"h100": "NVIDIA H100", "a100": "NVIDIA A100", "l4": "NVIDIA L4"}
CARDS |= {"rtx4090": "NVIDIA GeForce RTX 4090"}


def on(card: str):
    """A mesh of one such card, which need not be here."""
    device = AbstractDevice(device_kind=CARDS[card], num_cores=None, platform="gpu")
    names = ("data", "fsdp", "context", "tensor")
    types = (AxisType.Auto,) * len(names)
    mesh = AbstractMesh((1,) * len(names), names, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# A pair of blocks in float32, with heads of 128: 2 x 64 x 128 x 4 = 65,536 bytes. Rows of queries
# and weights: 16 x (128 + 64 + 8) x 4 = 12,800 bytes; 16 rows are the fewest.
@pytest.mark.parametrize(
    "card, dtype, size, group, steps, stages, needed",
    [
        ("h100", "float32", 128, 4, 1, 3, 2 * 65_536 + 12_800),
        ("a100", "float32", 128, 4, 1, 3, 2 * 65_536 + 12_800),
        ("l4", "float32", 128, 4, 1, 2, 65_536 + 12_800),  # 143,872 of 101,376
        ("rtx4090", "float32", 128, 4, 4, 2, 65_536 + 12_800),
        ("l4", "float32", 128, 4, 5, 2, 65_536 + 2 * 12_800),  # 20 rows, padded to 32
        ("l4", "float32", 128, 4, 9, 0, 65_536 + 4 * 12_800),
        ("l4", "float32", 64, 4, 9, 3, 2 * 32_768 + 64 * 136 * 4),
        ("l4", "bfloat16", 128, 8, 5, 3, 2 * 32_768 + 4 * 6_400),
        ("l4", "bfloat16", 256, 4, 1, 2, 65_536 + 16 * 328 * 2),
        ("l4", "bfloat16", 256, 8, 5, 0, 65_536 + 64 * 328 * 2),  # 107,520 of 101,376
        ("a100", "bfloat16", 256, 8, 5, 2, 65_536 + 64 * 328 * 2),  # 173,056 of 166,912 with 3
        # Matmuls of 64 rows on an H100: one pair more, and keys and values of 16 new tokens.
        ("h100", "bfloat16", 256, 8, 5, 2, 2 * 65_536 + 64 * 328 * 2 + 2 * 16 * 256 * 2),
        ("h100", "bfloat16", 256, 8, 4, 3, 2 * 65_536 + 32 * 328 * 2),
        ("h100", "float32", 256, 4, 1, 2, 131_072 + 16 * 328 * 4),
        ("h100", "float32", 256, 8, 5, 0, 2 * 131_072 + 64 * 328 * 4 + 2 * 16 * 256 * 4),
        ("a100", "float32", 256, 4, 5, 0, 131_072 + 32 * 328 * 4),
        ("l4", "float32", 256, 4, 1, 0, 131_072 + 16 * 328 * 4),
    ],
)
def test_decoding(card, dtype, size, group, steps, stages, needed):
    """Stages of the kernel, or 0 if the cache is read by XLA's attention."""
    q = jnp.zeros((1, steps, group, size), dtype)
    keys = jnp.zeros((1, 1, 128, size), dtype)
    with on(card):
        capability = attention.nvidia_capability()
        assert fits(q, keys) == (stages > 0)
    rows = max(16, 1 << (group * steps - 1).bit_length())
    shape = capability, rows, size, q.dtype.itemsize
    assert decoding_stages(*shape) == stages
    assert decoding_bytes(*shape, stages or 2) == needed


@pytest.mark.parametrize("size", [80, 96])
def test_decoding_needs_powers_of_two(size):
    with on("h100"):
        assert not fits(jnp.zeros((1, 1, 4, size)), jnp.zeros((1, 1, 128, size)))


# Triton's own figures, of compiling for these compute capabilities with jax 0.10.2: 16, 32 and 64
# rows of queries, with 3 stages.
@pytest.mark.parametrize(
    "capability, itemsize, size, allocated",
    [
        (8.9, 4, 64, (73_728, 81_920, 98_304)),
        (8.9, 4, 128, (143_424, 155_776, 180_480)),
        (8.9, 4, 256, (282_688, 303_232, 344_320)),
        (8.9, 2, 64, (37_120, 41_472, 40_960)),
        (8.9, 2, 128, (71_936, 78_336, 90_624)),
        (8.9, 2, 256, (141_568, 152_064, 172_544)),
        (9.0, 4, 128, (143_424, 155_776, 180_480)),
        (9.0, 2, 64, (37_120, 41_472, 61_440)),
        (9.0, 2, 128, (71_936, 78_336, 122_880)),
        (9.0, 2, 256, (141_568, 152_064, 245_760)),
        (10.0, 4, 256, (266_496, 270_848, 458_784)),
        (10.0, 2, 256, (141_568, 152_064, 229_408)),
        (12.0, 2, 256, (141_568, 152_064, 172_544)),
    ],
)
def test_the_figures_are_upper_bounds(capability, itemsize, size, allocated):
    for rows, bytes_ in zip((16, 32, 64), allocated, strict=True):
        assert bytes_ <= decoding_bytes(capability, rows, size, itemsize, 3)


@pytest.mark.parametrize(
    "capability, size, allocated",
    [(8.0, 128, 99_072), (8.9, 64, 49_920), (9.0, 128, 131_840), (10.0, 128, 164_672)],
)
def test_training_needs_no_more_than_the_figure(capability, size, allocated):
    """Triton's figure is of the kernel of the keys' and values' gradients, in 16-bit types."""
    assert allocated <= training_bytes(capability, size, 2)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    "dtype, size, kernel",
    [
        ("bfloat16", 64, "flash"),
        ("bfloat16", 80, "cudnn"),
        ("bfloat16", 96, "cudnn"),
        ("bfloat16", 128, "flash"),
        ("bfloat16", 256, "xla"),
        ("float32", 128, "xla"),
    ],
)
def test_training(card, dtype, size, kernel):
    q_BTNH = jnp.zeros((1, 128, 2, size), dtype)
    with on(card):
        assert attention._first_supported(q_BTNH, packed=True) == kernel


@pytest.mark.parametrize(
    "card, needed, room",
    [
        # Keys, values, and a pair of blocks of queries and gradients; an H100 keeps both pairs, and
        # weights and their gradients.
        ("l4", 2 * 256 * (2 * 128 + 2 * 64) + 1024, 101_376),
        ("h100", 2 * 256 * (2 * 128 + 4 * 64) + 2 * 2 * 128 * 64 + 1024, 232_448),
    ],
)
def test_a_named_kernel_that_does_not_fit_is_refused(card, needed, room):
    q_BTNH = jnp.zeros((1, 128, 2, 256), jnp.bfloat16)
    message = f"attention 'flash' needs {needed:,} bytes of shared memory for head size 256, but "
    message += f"the card has {room:,}: use auto or xla"
    with on(card), pytest.raises(ConfigError, match=message):
        self_attention(q_BTNH, q_BTNH, q_BTNH, kernel="flash")
