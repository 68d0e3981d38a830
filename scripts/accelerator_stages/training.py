"""Stage c: training steps of a 1B shape: plain, LayerSkip, and layer dropout that skips.

Each part is a process of its own, because the device's peak memory counts from its start.
Utilisation counts the FLOPs of the plain model, whatever LayerSkip adds or saves.
"""

import re
import time
from functools import partial

import jax
import numpy as np

from accelerator_stages.inputs import random_model
from accelerator_stages.report import Report, Row, card
from lsjax.cli.setup import exact_products
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.model.llama import stacked
from lsjax.training.flops import peak_flops, step_flops
from lsjax.training.step import init_state, make_train_step

STEPS = 8  # timed: a whole turn of the rotational curriculum
EXITS = EarlyExitConfig(curriculum="rotational", rotation=STEPS, e_scale=0.1)
CONFIGS = {
    "plain": {},
    "layerskip": dict(layer_dropout=LayerDropoutConfig(p_max=0.1), early_exit=EXITS),
    "dropout-mask": dict(layer_dropout=LayerDropoutConfig(p_max=0.5, skip="mask")),
    "dropout-gather": dict(layer_dropout=LayerDropoutConfig(p_max=0.5, skip="gather")),
}


def run(part: str, report: Report, tiny: bool) -> None:
    """One configuration of the step."""
    config = LlamaConfig.tiny(num_layers=2) if tiny else LlamaConfig.llama3_2_1b()
    rows, length = (2, 32) if tiny else (8, 2048)
    report.start(card(), rows_of_a_batch=rows, tokens_of_a_row=length)
    if jax.default_backend() == "cpu":
        exact_products()
    step = StepConfig(num_steps=1000, remat="dots_with_no_batch_dims_saveable", **CONFIGS[part])
    report.say("compiling")
    report.measure(part, partial(measure, step, config, rows, length))


def measure(config: StepConfig, shape: LlamaConfig, rows: int, length: int) -> Row:
    """Time and memory of a step."""
    tokens = np.random.default_rng(0).integers(shape.vocab_size, size=(rows, length + 1))
    tokens = tokens.astype(np.int32)
    batch = dict(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        segments_BT=np.ones((rows, length), np.int32),
        positions_BT=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )
    shapes = jax.eval_shape(lambda: init_state(config, stacked(random_model(shape, "float32"))))
    began = time.perf_counter()
    program = make_train_step(config).lower(shapes, batch).compile()
    compiling = time.perf_counter() - began
    state = jax.jit(lambda: init_state(config, stacked(random_model(shape, "float32"))))()
    for number in range(2 + STEPS):
        if number == 2:  # the first ones warm up
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = program(state, batch)
    loss = float(metrics["loss"])
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / STEPS
    if not np.isfinite(loss) or int(state.skipped):
        raise FloatingPointError(f"loss {loss}, {int(state.skipped)} steps skipped")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    peak = peak_flops(dtype, 1)
    found = program.memory_analysis()
    predicted = found.argument_size_in_bytes + found.output_size_in_bytes
    predicted += found.temp_size_in_bytes - found.alias_size_in_bytes
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "tokens/s": rows * length / seconds,
        "ms a step": seconds * 1e3,
        "utilisation": step_flops(shape, rows, length) / seconds / peak if peak else None,
        "GB at the peak": used and used / 1e9,
        "GB by the compiler": predicted / 1e9,
        "attention": attention_kernel(program.as_text()),
        "loss": loss,
        "s compiling": compiling,
    }


def attention_kernel(hlo: str) -> str:
    """The kernel of the attention, by the calls in the compiled program."""
    targets = " ".join(set(re.findall(r'custom_call_target="([^"]+)"', hlo)))
    if "fmha" in targets:
        return "cudnn"
    if "flash_forward/pallas_call" in hlo:
        return "flash"
    return "splash" if "tpu_custom_call" in targets and "splash" in hlo else "xla"
