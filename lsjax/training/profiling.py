"""How fast a run is: FLOPs of a step, peaks of accelerators, and traces for xprof and TensorBoard.

FLOPs are those of the plain model, whatever LayerSkip adds or saves. So utilisations of runs with
and without LayerSkip are comparable (Chowdhery et al., 2022, appendix B). Gradients of frozen
weights do not count.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import jax

from lsjax.config import (
    AnyPath,
    EarlyExitConfig,
    ExitBlocksConfig,
    LlamaConfig,
    LoraConfig,
    ProfileConfig,
    in_bucket,
)
from lsjax.io.files import whole_directory
from lsjax.model.lora import num_adapter_params
from lsjax.training.early_exit import exit_counts

# Dense bfloat16 FLOPs per second of one jax device, by the start of its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,  # before L4: names match by their start
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOPs per second of an accelerator, by jax's name; None for CPUs and unknown devices."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def step_flops(
    config: LlamaConfig,
    batch_size: int,
    seq_len: int,
    lora: LoraConfig | None = None,
    exit_blocks: ExitBlocksConfig | None = None,
) -> float:
    """FLOPs of one plain training step: one forward pass, one backward pass for the inputs, and one
    for the trained weights. Counts two FLOPs per matrix weight and token, with the head and without
    the lookup. Attention counts the causal half of T^2. With exit blocks, the model has a forward
    pass alone."""
    if exit_blocks is not None and exit_blocks.exits:
        return _block_flops(config, exit_blocks, seq_len) * batch_size * seq_len
    matrices = config.num_layers * config.layer_params + config.head_params
    attention = config.num_layers * config.num_heads * config.head_dim * seq_len
    products = 3.0 * (2.0 * matrices + 2.0 * attention)
    if lora is not None and lora.rank > 0:
        products += 3 * 2.0 * num_adapter_params(config, lora) - 2.0 * matrices
    return products * batch_size * seq_len


def _block_flops(config: LlamaConfig, blocks: ExitBlocksConfig, seq_len: int) -> float:
    """FLOPs for a token. The head gets no gradient, and kept states need no layer."""
    attention = 2.0 * config.num_heads * config.head_dim * seq_len
    layer = 2.0 * config.layer_params + attention
    head = 2.0 * (blocks.draft_vocab or config.vocab_size) * config.hidden_size
    block = layer
    if not blocks.feed_forward:
        block -= 2.0 * 3 * config.hidden_size * config.intermediate_size
    model = 0.0 if blocks.keep_states else config.num_layers * layer + head
    return model + len(blocks.exits) * (3 * block + 2 * head)


def exit_flops(
    early_exit: EarlyExitConfig, config: LlamaConfig, tokens: int, num_steps: int
) -> float:
    """FLOPs that the intermediate exits add to a step, averaged over the run: three passes through
    the head for each of their tokens."""
    exits = exit_counts(early_exit, config.num_layers, num_steps).mean() * early_exit.token_share
    return 3.0 * 2.0 * config.head_params * tokens * float(exits)


@contextmanager
def trace(directory: AnyPath, name: str = "") -> Iterator[None]:
    """Adds a trace of this context, named by time by default, to a directory or a bucket's."""
    options = jax.profiler.ProfileOptions()
    options.session_id = name
    options.python_tracer_level = 0  # Python's calls would fill the trace
    with whole_directory(directory) if in_bucket(directory) else nullcontext(directory) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with jax.profiler.trace(folder, profiler_options=options):
            yield


@contextmanager
def traced(train_step: Callable, config: ProfileConfig, directory: AnyPath, done: int):
    """Yields the train step, which traces the configured steps. done: steps done before."""
    begin, end = max(config.start, done + 1), config.start + config.steps
    writes = config.all_processes or jax.process_index() == 0

    def traced_step(state, batch):
        nonlocal done
        done += 1
        if writes and begin == done < end:
            tracing.enter_context(trace(directory, f"step_{done}_process_{jax.process_index()}"))
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = train_step(state, batch)
        if writes and begin <= done == end - 1:
            jax.block_until_ready(metrics)
            tracing.close()
        return state, metrics

    with ExitStack() as tracing:
        yield traced_step
