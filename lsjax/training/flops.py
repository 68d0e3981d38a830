"""What a training step has to compute, and what the devices could: model FLOPs utilisation.

The count is that of the plain model, whatever LayerSkip adds or saves, so that utilisations of
runs with and without it compare (Chowdhery et al., 2022, appendix B). Of frozen weights no gradient
is needed and none is counted.
"""

import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lsjax.config import EarlyExitConfig, LlamaConfig, LoraConfig
from lsjax.training.early_exit import mean_exits

# Dense bfloat16 FLOPs per second of one jax device, by what its `device_kind` starts with (the
# makers' data sheets).
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
    """FLOPs of one plain training step: forward, and backward as many for the inputs and as many
    for the weights that are trained.

    Two for each weight of a matrix and token, head included and look-up not; attention counts the
    scores and sums that causality leaves, half of T^2.
    """
    matrices = config.num_layers * config.layer_params + config.head_params
    attention = config.num_layers * config.num_heads * config.head_dim * seq_len
    products = 3.0 * (2.0 * matrices + 2.0 * attention)
    if lora is not None and lora.rank > 0:
        adapters = config.num_layers * adapter_params(config, lora)
        products += 3 * 2.0 * adapters - 2.0 * matrices
    return products * batch_size * seq_len


def adapter_params(config: LlamaConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters of one layer."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads
    qkv = (heads + 2 * config.num_kv_heads) * config.head_dim
    sizes = {  # inputs + outputs
        "qkv": d + qkv,
        "out": heads * config.head_dim + d,
        "gate_up": d + 2 * f,
        "down": f + d,
    }
    return lora.rank * sum(sizes[target] for target in lora.targets)


def exit_flops(
    early_exit: EarlyExitConfig, config: LlamaConfig, tokens: int, num_steps: int
) -> float:
    """FLOPs that the intermediate exits add to a step of so many tokens, on average over the run:
    three passes through the head for each token that an exit learns."""
    exits = mean_exits(early_exit, config.num_layers, num_steps) * early_exit.token_share
    return 3.0 * 2.0 * config.head_params * tokens * exits


def peak_flops(dtype: DTypeLike, devices: int) -> float | None:
    """FLOPs per second of so many devices together; of CPUs what a large product of this type
    reaches here, for each process. None for an accelerator that is not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured(dtype) * jax.process_count()
    peak = device_peak(device.device_kind)
    return None if peak is None else peak * devices


def device_peak(device_kind: str) -> float | None:
    """FLOPs per second of an accelerator by jax's name of it, None for one that is not known."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def _measured(dtype: DTypeLike, size: int = 1536, repeats: int = 4) -> float:
    """The best of a few products, as others may use the machine too."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    best = min(_seconds(product, x) for _ in range(repeats))
    return 2.0 * size**3 / best


def _seconds(product, x) -> float:
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    return time.perf_counter() - start
