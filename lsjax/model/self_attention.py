"""Causal attention within whole sequences, by the kernel that suits the devices.

    xla     products and a softmax, with the backward pass of products.py; [T, T] weights are held
    splash  TPU kernel that comes with jax: blocks of the weights, those past the diagonal skipped
    flash   GPU kernel of flash.py: blocks of the weights, those that are hidden skipped
    cudnn   cuDNN's flash attention, on NVIDIA GPUs since Ampere

All give the same up to rounding. On a mesh the kernels run on each device's rows and heads.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lsjax.config import AttentionKernel, check
from lsjax.model.attention import OWN, SAVED, attention
from lsjax.sharding import ROWS, on_each_device, platform

# Steps of a splash block; of those that pad the sequence least, the first.
BLOCKS = (512, 384, 256, 128)
# Compute capability of cards that programs are compiled for without one (lsjax/aot/chips.py): jax's
# meshes know the names of such devices only.
CAPABILITIES = {"NVIDIA A100": 8.0, "NVIDIA H100": 9.0, "NVIDIA H200": 9.0}


def self_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"] | None = None,
    kernel: AttentionKernel = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention within whole sequences, of each token to those of its own segment; softmax
    in float32 or wider.

    segments_BT: number of the document that a token belongs to; one document by default. Padding
    is a segment like the others. Segments are contiguous.

    kernel: "auto" is the first of these that takes the arrays: splash on TPUs; on GPUs flash for
    several documents, and cudnn; xla. Splash takes float32 and bfloat16, and lengths that no block
    divides it pads. cudnn takes 16-bit floats, even lengths, and heads of up to 128 by multiples of
    8. flash takes 16-bit floats, lengths that OWN divides, and heads of 16, 32, 64 or 128. On CPUs
    splash and flash are interpreted, for tests.

    Raises ConfigError where the kernel that is asked for by name does not fit.
    """
    if kernel == "auto":
        packed = ("flash",) if segments_BT is not None else ()
        kernels = {"tpu": ("splash",), "gpu": (*packed, "cudnn")}.get(platform(), ())
        kernel = next((name for name in kernels if _problem(name, q_BTNH) is None), "xla")
    problem = _problem(kernel, q_BTNH)
    check(problem is None, f"attention {kernel!r} {problem}: use auto or xla")
    if kernel == "xla":
        return attention(q_BTNH, k_BTKH, v_BTKH, _mask(q_BTNH, segments_BT))
    heads = P(ROWS, None, "tensor")
    return on_each_device(
        {"splash": _splash, "flash": _flash, "cudnn": _cudnn}[kernel],
        (q_BTNH, k_BTKH, v_BTKH, segments_BT),
        (heads, heads, heads, P(ROWS)),
        heads,
    )


def _problem(kernel: str, q_BTNH: Array) -> str | None:
    """Why the kernel can't be used."""
    (_, steps, _, size), dtype, devices = q_BTNH.shape, q_BTNH.dtype, platform()
    if kernel == "splash":
        if devices not in ("tpu", "cpu"):
            return f"is for TPUs, but this program is for {devices}"
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes float32 and bfloat16, not {dtype}"
    if kernel == "flash":
        if devices != "cpu" and (devices != "gpu" or nvidia_capability() < 8):
            return f"is for NVIDIA GPUs since Ampere, but this program is for {devices}"
        if devices == "gpu" and dtype not in (jnp.float16, jnp.bfloat16):
            return f"takes float16 and bfloat16, not {dtype}"
        if size not in (16, 32, 64, 128):
            return f"takes head sizes of 16, 32, 64 and 128, not {size}"
        if steps % OWN:
            return f"takes lengths that {OWN} divides, not {steps}"
    if kernel == "cudnn":
        if devices != "gpu" or nvidia_capability() < 8:
            return f"is for NVIDIA GPUs since Ampere, but this program is for {devices}"
        if dtype not in (jnp.float16, jnp.bfloat16):
            return f"takes float16 and bfloat16, not {dtype}"
        if size > 128 or size % 8:
            return f"takes head sizes of 8, 16, ... 128, not {size}"
        if steps % 2:
            return f"takes even lengths, not {steps}"
    return None


def nvidia_capability() -> float:
    """Compute capability of the NVIDIA GPUs that the program being traced is for; 0 for others."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    local = jax.local_devices()
    kind = local[0].device_kind if device is None else device.device_kind
    here = next((one for one in local if one.device_kind == kind), None)
    try:
        return float(here.compute_capability)
    except (AttributeError, ValueError):  # no GPU that is here, or none of NVIDIA's
        return next((value for name, value in CAPABILITIES.items() if kind.startswith(name)), 0.0)


def _mask(q_BTNH, segments_BT):
    """[B or 1, T, T]: which keys each query sees."""
    steps = q_BTNH.shape[1]
    mask_BTT = jnp.tril(jnp.ones((1, steps, steps), bool))
    if segments_BT is not None:
        mask_BTT &= segments_BT[:, :, None] == segments_BT[:, None]
    return mask_BTT


def _cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Segments go in as a mask, [B, 1, T, T], and the blocks past the diagonal are skipped."""
    mask = None if segments_BT is None else _mask(q_BTNH, segments_BT)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, implementation="cudnn"
    )


def _flash(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    # Here, as Pallas takes most of a second to import.
    from lsjax.model.flash import flash_attention

    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    return flash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _splash(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Padding to whole blocks comes last, where no token looks."""
    # Here, as it takes most of a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    steps, heads, size = q_BTNH.shape[1:]
    block = min(BLOCKS, key=lambda block: -(-steps // block) * block)
    padding = -steps % block

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))

    mask = splash.CausalMask((steps + padding, steps + padding))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name=SAVED,
        interpret=platform() == "cpu",
    )

    def one_row(q_TNH, k_TKH, v_TKH, segments_T):
        segments = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        q_NTH, k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (q_TNH * size**-0.5, k_TKH, v_TKH))
        return attend(q_NTH, k_KTH, v_KTH, segment_ids=segments).swapaxes(0, 1)

    arrays = jax.tree.map(padded, (q_BTNH, k_BTKH, v_BTKH, segments_BT))
    return jax.vmap(one_row)(*arrays)[:, :steps]
