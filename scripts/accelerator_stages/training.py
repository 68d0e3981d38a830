"""Stage c: training steps of a 1B shape: plain, LayerSkip, and layer dropout that skips. Stage d:
the quickstart's configuration.

Each part runs in its own process, because peak memory counts from the start of the process.
Utilisation counts the FLOPs of the plain model, whatever LayerSkip adds or saves.
"""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accelerator_stages.decoding import random_model
from accelerator_stages.results import PartResults, card

from lsjax.aot.hlo import attention_kernel
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.model.llama import stacked
from lsjax.training.profiling import peak_flops, step_flops
from lsjax.training.step import init_state, make_train_step

STEPS = 8  # timed: a complete turn of the rotational curriculum
EXITS = EarlyExitConfig(curriculum="rotational", rotation=STEPS, e_scale=0.1)
CONFIGS = {
    "plain": {},
    "layerskip": dict(layer_dropout=LayerDropoutConfig(p_max=0.1), early_exit=EXITS),
    "dropout-mask": dict(layer_dropout=LayerDropoutConfig(p_max=0.5, skip="mask")),
    "dropout-gather": dict(layer_dropout=LayerDropoutConfig(p_max=0.5, skip="gather")),
}
ROOT = Path(__file__).parents[2]
SHORT = "--num-steps 4 --optimizer.warmup-steps 1 --evaluation.batches 1 --evaluation.num-prompts 1"


def run_steps(part: str, results: PartResults, tiny: bool) -> None:
    """One configuration of the step."""
    config = LlamaConfig.tiny(num_layers=2) if tiny else LlamaConfig.llama3_2_1b()
    rows, length = (2, 32) if tiny else (8, 2048)
    results.start(card(), rows_of_a_batch=rows, tokens_of_a_row=length)
    step = StepConfig(num_steps=1000, remat="dots_with_no_batch_dims_saveable", **CONFIGS[part])
    results.say("compiling")
    results.measure(part, partial(measure, step, config, rows, length))


def measure(config: StepConfig, shape: LlamaConfig, rows: int, length: int) -> dict[str, Any]:
    """Time and memory of a step."""
    tokens = np.random.default_rng(0).integers(shape.vocab_size, size=(rows, length + 1))
    tokens = tokens.astype(np.int32)
    batch = dict(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        segments_BT=np.ones((rows, length), np.int32),
        positions_BT=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )
    state = jax.jit(lambda: init_state(config, stacked(random_model(shape, "float32"))))()
    began = time.perf_counter()
    program = make_train_step(config).lower(state, batch).compile()
    compiling = time.perf_counter() - began
    for number in range(2 + STEPS):
        if number == 2:  # the first two warm up
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = program(state, batch)
    loss = float(metrics["loss"])
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / STEPS
    if not np.isfinite(loss) or int(state.skipped):
        raise FloatingPointError(f"loss {loss}, {int(state.skipped)} steps skipped")
    peak = peak_flops(jax.devices()[0].device_kind)
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
        "attention": attention_kernel([program.as_text()]),
        "loss": loss,
        "s compiling": compiling,
    }


def run_quickstart(part: str, results: PartResults, tiny: bool) -> None:
    """Stage d: trains, decodes, checks the tokens and measures the speed, with the programs and
    flags of the Makefile. Needs all dependencies of lsjax."""
    work = (results.output / "quickstart").resolve()
    shutil.rmtree(work, ignore_errors=True)  # else training would resume from its checkpoint
    texts = ["--model", str(work), "--prompt-file", f"{work}/prompts.jsonl"]
    texts += ["--num-draft-tokens", "5"]
    new = "8" if tiny else "64"
    programs = {
        "train": ["train.py", "--config", "configs/quickstart.py", "--workdir"]
        + [str(work), *(SHORT.split() if tiny else [])],
        "decode": ["decode.py", *texts, "--max-new-tokens", new]
        + ["--strategy", "self_speculative", "--exit-layer", "4"],
        "benchmark": ["-m", "lsjax", "benchmark", *texts, "--new-tokens", new]
        + f"--exit-layers 2 4 --repeats 1 --output {work}/benchmark".split(),
    }

    def timed(words: list[str]) -> dict[str, Any]:
        began = time.monotonic()
        # Ends before this process is killed, which would orphan the program.
        rest = max(1.0, results.deadline - began - 20)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=rest)
        return {"seconds": time.monotonic() - began}

    for name, words in programs.items():
        results.measure(name, partial(timed, words))
    results.start(card())  # only now: until here the programs need the device
    keys = ("tokens_per_second", "speedup", "acceptance_rate", "ideal", "share_of_ideal")
    cells = work / "benchmark" / "cells.jsonl"
    if cells.exists():
        for row in map(json.loads, cells.read_text().splitlines()):
            values = {key.replace("_", " "): row[key] for key in keys}
            results.row(f"{row['strategy']}, exit {row['exit_layer']}", values)
