"""FLOPs of a training step, and the peak of the devices: model FLOPs utilisation.

The count is that of the plain model, whatever LayerSkip adds or saves, so that utilisations of
runs with and without it compare (Chowdhery et al., 2022, appendix B). Frozen weights have no
gradient, and none is counted.
"""

import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lsjax.config import EarlyExitConfig, LlamaConfig, LoraConfig
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import split, with_adapters
from lsjax.training.early_exit import exit_counts

# Dense bfloat16 FLOPs per second of one jax device, by the start of its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def step_flops(
    config: LlamaConfig, batch_size: int, seq_len: int, lora: LoraConfig | None = None
) -> float:
    """FLOPs of one plain training step: forward, and backward once more for the inputs and once
    more for the trained weights.

    Two for each weight of a matrix and token, with the head and without the lookup. Attention
    counts the scores and sums that causality leaves, half of T^2.
    """
    matrices = config.num_layers * config.layer_params + config.head_params
    attention = config.num_layers * config.num_heads * config.head_dim * seq_len
    products = 3.0 * (2.0 * matrices + 2.0 * attention)
    if lora is not None and lora.rank > 0:
        products += 3 * 2.0 * num_adapter_params(config, lora) - 2.0 * matrices
    return products * batch_size * seq_len


def num_adapter_params(config: LlamaConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters of all layers."""
    adapted = jax.eval_shape(
        lambda: split(with_adapters(stacked(Llama(config, rngs=nnx.Rngs(0))), lora, 0))[0]
    )
    return sum(leaf.size for leaf in jax.tree.leaves(adapted))


def exit_flops(
    early_exit: EarlyExitConfig, config: LlamaConfig, tokens: int, num_steps: int
) -> float:
    """FLOPs that the intermediate exits add to a step, on average over the run: three passes
    through the head for each of their tokens."""
    exits = exit_counts(early_exit, config.num_layers, num_steps).mean() * early_exit.token_share
    return 3.0 * 2.0 * config.head_params * tokens * float(exits)


def peak_flops(dtype: DTypeLike, devices: int) -> float | None:
    """FLOPs per second of so many devices together; None for an unknown accelerator.

    On CPUs the speed of a large product of this type, measured here, once for each process.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured(dtype) * jax.process_count()
    peak = device_peak(device.device_kind)
    return None if peak is None else peak * devices


def device_peak(device_kind: str) -> float | None:
    """FLOPs per second of an accelerator by jax's name of it, None for an unknown one."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def _measured(dtype: DTypeLike, size: int = 1536, repeats: int = 4) -> float:
    """Speed of the fastest of a few products, as others may use the machine too."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2.0 * size**3 / min(_seconds(product, x) for _ in range(repeats))


def _seconds(product, x) -> float:
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    return time.perf_counter() - start
