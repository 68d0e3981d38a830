"""The choice of the remat policy, among made-up reports of compiled steps."""

import dataclasses
import re

import jax
import pytest

from lsjax.aot import remat as module
from lsjax.aot.chips import CHIPS, GIB, slice_of
from lsjax.aot.remat import CANDIDATES, fastest, local_chip, with_remat
from lsjax.config import ConfigError, DataConfig, LlamaConfig, MeshConfig, StepConfig, TrainConfig
from lsjax.sharding import make_mesh
from lsjax.training.prepare import TrainingRun
from lsjax.training.recipe import PAPER
from lsjax.training.step import make_train_step
from tests.marks import with_extra

V5E = next(chip for chip in CHIPS if chip.name == "v5e")
CONFIG = TrainConfig(
    data=DataConfig(source="text", paths=("a",), tokenizer="t"),
    num_steps=100,
    batch_size=8,
    seq_len=64,
    model=LlamaConfig.tiny(),
    remat="auto",
)
# Policy -> seconds and GiB of a step, or None where it does not fit.
FASTER = {
    "none": None,
    "dots_with_no_batch_dims_saveable": (1.2, 15.0),
    "attention": (1.1, 12.0),
    "attention_output": (1.15, 10.0),
    "nothing_saveable": (1.3, 7.0),
}


@pytest.fixture
def compiled(monkeypatch):
    """Reports of `figures` instead of compiled steps."""

    def use(figures):
        def reports(name, policy, counted, chip, sizes):
            found = {"too_large": f"train needs 30.0 GiB of 16.0 with {policy}"}
            if figures[policy]:
                seconds, gib = figures[policy]
                found = {"too_large": None, "memory": {"total": gib * GIB}}
                found["serial_seconds"] = seconds
            return [found]

        monkeypatch.setattr(module, "train_step", lambda config, mesh, recipe: (config.remat, {}))
        monkeypatch.setattr(module, "program_reports", reports)

    return use


def test_the_fastest_that_fits(compiled):
    compiled(FASTER)
    said = []
    chosen = fastest(CONFIG, make_mesh(MeshConfig()), V5E, said.append)
    assert chosen == dataclasses.replace(CONFIG, remat="attention")
    assert said[0] == "remat none: too large"
    assert said[2] == "remat attention: 12.0 of 16.0 GiB, 1.100 s a step"
    assert len(said) == len(CANDIDATES)


def test_it_says_by_how_much_none_fits(compiled):
    compiled(dict.fromkeys(CANDIDATES))
    with pytest.raises(ConfigError, match=r"fits v5e: .* 30\.0 GiB of 16\.0 .*raise micro_batches"):
        fastest(CONFIG, make_mesh(MeshConfig()), V5E, print)


def test_cpus_keep_everything_and_compile_nothing(compiled):
    compiled({})
    run = TrainingRun(CONFIG, *[None] * 8, PAPER)
    assert with_remat(run, print).config.remat == "none"
    named = dataclasses.replace(CONFIG, remat="attention")
    assert with_remat(dataclasses.replace(run, config=named), print).config is named


class Local:
    def __init__(self, platform, kind, limit):
        self.platform, self.device_kind, self.limit = platform, kind, limit

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit}


@pytest.mark.parametrize(
    "device, name, memory",
    [
        (Local("gpu", "NVIDIA H100 80GB HBM3", 70 * GIB), "h100", 70 * GIB),
        (Local("tpu", "TPU v5 lite", None), "v5e", V5E.hbm),
        (Local("gpu", "NVIDIA Unheard-Of", 20 * GIB), "h100", 20 * GIB),
    ],
)
def test_the_chip_of_this_machine(monkeypatch, device, name, memory):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    chip = local_chip()
    assert (chip.name, chip.hbm) == (name, memory)


def test_a_step_needs_the_choice():
    with pytest.raises(ConfigError, match="remat 'auto' is chosen by train.py and lsjax.train"):
        make_train_step(StepConfig(num_steps=1, remat="auto"))


@pytest.mark.long
@with_extra("tpu")
def test_of_compiled_steps():
    """What is printed of each policy, and that the least time decides."""
    chip, devices = slice_of("v5e:2x2")
    said = []
    mesh = make_mesh(MeshConfig(fsdp=4), devices)
    model = LlamaConfig.tiny(hidden_size=256, num_heads=2, num_kv_heads=1, head_dim=128)
    config = dataclasses.replace(CONFIG, model=model, batch_size=256, seq_len=512)
    with jax.default_matmul_precision("default"):  # as in the program
        chosen = fastest(config, mesh, chip, said.append)
    found = [re.fullmatch(r"remat (\w+): (.*) of 16.0 GiB, (.*) s a step", line) for line in said]
    memory = [float(each[2]) for each in found]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[-1]
    assert chosen.remat == min(found, key=lambda each: float(each[3]))[1]
