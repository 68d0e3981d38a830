"""Causal attention on TPUs by jax's splash kernel, which skips fully masked blocks.

A shard of queries attends to the keys of the whole row. Its mask depends on the places of its
queries in the row, which are known when the program is traced.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from lsjax.model.products import SAVED
from lsjax.sharding import platform

# Arrays that describe a mask.
Kernel = splash.splash_attention_kernel.SplashAttentionKernel
# Candidate block sizes. The first that pads the queries least is used.
BLOCKS = (512, 384, 256, 128)


def shard_kernels(places_CT: Int[np.ndarray, "C T"], window: int | None = None) -> Kernel:
    """One kernel for C shards of queries at these places. Its arrays have a leading axis C.

    window: keys that a query sees, its own included. All heads have the same mask.
    """
    shards, steps = places_CT.shape
    block = _block(steps)
    places = np.pad(places_CT, ((0, 0), (0, -steps % block)), mode="edge").ravel()
    shape = len(places), -(-shards * steps // block) * block
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), offset=0)
    mask.q_sequence = places.astype(np.int32)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask]),
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name=SAVED,
        interpret=platform() == "cpu",
    )
    # Arrays over queries, or [1, blocks of queries, blocks of keys].
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, shards, axis=x.ndim // 2)), kernel)


def splash_attention(
    kernel: Kernel,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"] | None,
    segments_BS: Int[Array, "B S"] | None,
) -> Float[Array, "B T N H"]:
    """Attention of a shard's queries to the keys of the whole row. kernel: the shard's.

    Pads to full blocks. Padded keys are at the end, where causal masking hides them.
    """
    steps, size = q_BTNH.shape[1], q_BTNH.shape[3]
    block = _block(steps)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))

    def one_row(q_TNH, k_SKH, v_SKH, segments):
        q_NTH, k_KSH, v_KSH = (x.swapaxes(0, 1) for x in (q_TNH * size**-0.5, k_SKH, v_SKH))
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segments).swapaxes(0, 1)

    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BS)
    arrays = jax.tree.map(padded, (q_BTNH, k_BSKH, v_BSKH, segments))
    return jax.vmap(one_row)(*arrays)[:, :steps]


def _block(steps: int) -> int:
    return min(BLOCKS, key=lambda block: -(-steps // block) * block)
