"""What programs are compiled for, and programs without tuned code on every platform."""

from functools import partial
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lsjax import platforms
from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, StepConfig
from lsjax.decoding.compiler import Programs
from lsjax.decoding.programs import decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.evaluation.exits import _score_rows, exit_sums
from lsjax.kernels.matmuls import gradients_first
from lsjax.model.llama import Llama
from lsjax.platforms import shared_memory, tuned_for, with_kernels
from lsjax.training.step import init_state, make_train_step
from tests.marks import long
from tests.states import new_state

SHAPE = LlamaConfig.tiny(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
DEVICES = {"cpu": "cpu", "tpu": "TPU v6 lite", "gpu": "NVIDIA H100"}
# What tuned code leaves in a traced program.
TUNED = ("pallas_call", "cudnn", "optimization_barrier")
ROW = jax.ShapeDtypeStruct((2, 128), jnp.int32)


def on(platform: str):
    """A mesh of one device of this platform, which need not be here."""
    names = ("data", "fsdp", "context", "tensor")
    types = (AxisType.Auto,) * len(names)
    device = AbstractDevice(device_kind=DEVICES[platform], num_cores=None, platform=platform)
    mesh = AbstractMesh((1,) * len(names), names, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def model_shapes(dtype=jnp.float32):
    return jax.eval_shape(lambda: Llama(SHAPE, rngs=nnx.Rngs(0), dtype=dtype))


def training_step(kernels):
    """Gradients of all that a step may have."""
    config = StepConfig(
        num_steps=10,
        kernels=kernels,
        dtype="bfloat16",
        remat="dots_with_no_batch_dims_saveable",
        layer_dropout=LayerDropoutConfig(p_max=0.2),
        early_exit=EarlyExitConfig(curriculum="all"),
    )
    state = jax.eval_shape(partial(init_state, config), model_shapes())
    batch = {f"{name}_BT": ROW for name in ("tokens", "labels", "segments", "positions")}
    return make_train_step(config), (state, batch)


def scored_exits(kernels):
    batch = {f"{name}_BT": ROW for name in ("tokens", "labels", "segments", "positions")}
    settings = dict(dtype="bfloat16", micro_batches=1, attention="auto", kernels=kernels)
    return partial(exit_sums, **settings), (model_shapes(), batch)


def scored_text(kernels):
    arguments = model_shapes(jnp.bfloat16), ROW, ROW
    return partial(_score_rows, exit_layer=1, kernels=kernels), arguments


def decoding_round(kernels):
    strategy, model = SelfSpeculative(1, 3), model_shapes(jnp.bfloat16)
    arguments = jax.eval_shape(strategy.arguments, model)

    def loop(model, state, rounds, arguments):
        with with_kernels(kernels):
            return decode(model, state, rounds, arguments, strategy=strategy)

    return loop, (model, state_shapes(), jax.ShapeDtypeStruct((), jnp.int32), arguments)


def read_prompt(kernels):
    def read(model, state, start):
        with with_kernels(kernels):
            return prefill(model, state, start, chunk=32, depth=2)

    arguments = model_shapes(jnp.bfloat16), state_shapes(), jax.ShapeDtypeStruct((), jnp.int32)
    return read, arguments


def state_shapes():
    sizes = dict(capacity=320, num_layers=2, dtype=jnp.bfloat16)
    return jax.eval_shape(lambda: new_state(SHAPE, [Request(prompt=[1, 2])], **sizes))


def traced(program, kernels, platform) -> str:
    """The traced program, without the name of its devices."""
    function, arguments = program(kernels)
    with on(platform):
        text = str(jax.make_jaxpr(function)(*arguments))
    return text.replace(f"device_kind={DEVICES[platform]}, num_cores=None, platform={platform}", "")


@pytest.mark.parametrize(
    "program", [training_step, decoding_round, *long(scored_exits, scored_text, read_prompt)]
)
def test_reference_programs_are_the_same_on_every_platform(program):
    """Nothing in them is tuned for one."""
    reference = {platform: traced(program, "reference", platform) for platform in DEVICES}
    assert reference["tpu"] == reference["gpu"] == reference["cpu"]
    assert not any(word in reference["cpu"] for word in TUNED)
    assert traced(program, "auto", "tpu") != reference["tpu"]


@pytest.mark.parametrize(
    "program, kernel", [(training_step, "flash_forward"), (decoding_round, "flash_decoding")]
)
def test_gpus_run_their_kernels_by_default(program, kernel):
    assert f"name={kernel}" in traced(program, "auto", "gpu")


def test_programs_of_one_setting_are_not_taken_for_the_other():
    @jax.jit
    def setting(x):
        return x + (tuned_for() == "reference")

    @jax.jit
    def inner_and_own(x):
        with with_kernels("reference"):
            inner = setting(x)
        return inner, setting(x)

    assert setting(0) == 0
    with with_kernels("reference"):
        assert setting(0) == 1
    assert setting(0) == 0
    assert inner_and_own(0) == (1, 0)


def test_gradients_are_traced_under_the_setting(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")

    def gradient(kernels):
        def loss(x):
            return sum(gradients_first(x, x))

        with with_kernels(kernels):
            return str(jax.make_jaxpr(jax.grad(loss))(1.0))

    assert "optimization_barrier" in gradient("auto")
    assert "optimization_barrier" not in gradient("reference")


def test_other_threads_keep_their_setting():
    found = []
    with with_kernels("reference"):
        thread = Thread(target=lambda: found.append(tuned_for()))
        thread.start()
        thread.join()
    assert found == ["cpu"]


def test_an_engine_compiles_its_programs_under_the_setting():
    """On a CPU the reference attends to all slots at once, without a branch."""

    def branches(kernels):
        loop = partial(decode, strategy=Autoregressive())
        programs = Programs(model_shapes(), kernels=kernels)
        program = programs.lower(loop, state_shapes(), np.int32(1), ())
        return program.as_text().count("stablehlo.case")

    assert branches("reference") == 0 < branches("auto")


@pytest.mark.parametrize(
    "capability, kib", [(8.0, 163), (8.6, 99), (8.9, 99), (9.0, 227), (12.0, 99), (13.7, 99)]
)
def test_shared_memory(capability, kib):
    """Cards that are not known have the least of all."""
    assert shared_memory(capability) == 1024 * kib
