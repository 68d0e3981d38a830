"""Models of each family: transformers' own numbers at every exit, and exports."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.huggingface import save
from lsjax.config import LlamaConfig, RopeScaling
from lsjax.model.exit_model import first_layers
from lsjax.model.llama import Llama
from tests.marks import long

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
FAMILIES = ("mistral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3")


@jax.jit
def all_exits(model: Llama, tokens: jax.Array) -> jax.Array:
    return model.unembed(model.exits(tokens))


SHORT = ("biases", "llama3_rope", "gqa_tied", "qwen3", "smollm3", "olmo3")


@pytest.mark.parametrize("name", [*SHORT, *long(*(name for name in VARIANTS if name not in SHORT))])
def test_numbers_of_transformers(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    model, tokens = load(GOLDEN / name), golden["tokens"]
    # The greedy continuation shares the shape, so that it costs no second compilation.
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(all_exits(model, tokens))
        greedy = np.asarray(all_exits(model, golden["greedy"]))[-1].argmax(-1)
    np.testing.assert_allclose(logits[-1], golden["logits"], atol=2e-4, rtol=0)
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, :, :-1]))
    losses = -np.take_along_axis(log_probs, tokens[None, :, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, golden["exit_losses"], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(greedy[:, 7:-1], golden["greedy"][:, 8:])


@pytest.mark.parametrize("name", ["smollm3", *long("gqa_tied", "olmo3")])
def test_an_exit_as_a_model_of_its_own(name, tmp_path):
    """Written and read again, it has the losses of that exit in transformers. Layers without rope
    and with windows stay where they are."""
    golden = np.load(GOLDEN / name / "golden.npz")
    whole, tokens = load(GOLDEN / name), golden["tokens"]
    exit_layer = whole.config.num_layers - 1
    save(first_layers(whole, exit_layer), tmp_path / "exit")
    model = load(tmp_path / "exit")
    assert model.config.num_layers == exit_layer
    with jax.default_matmul_precision("highest"):
        log_probs = np.asarray(jax.nn.log_softmax(all_exits(model, tokens)[-1, :, :-1]))
    losses = -np.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, golden["exit_losses"][exit_layer - 1], atol=2e-4, rtol=0)


def test_variants_exercise_what_they_are_named_for():
    configs = {name: open_checkpoint(GOLDEN / name).config for name in VARIANTS}
    assert configs["mha_untied"].num_kv_heads == configs["mha_untied"].num_heads
    assert not configs["mha_untied"].tie_embeddings and configs["gqa_tied"].tie_embeddings
    assert configs["linear_rope"].rope_scaling == RopeScaling(kind="linear", factor=3.0)
    assert configs["old_config"].rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert configs["old_config"].rope_theta == 5_000
    assert configs["llama3_rope"].rope_scaling.original_context == 16
    assert configs["biases"].attention_bias and configs["biases"].mlp_bias
    assert configs["head_dim"].head_dim == 12
    assert len(list((GOLDEN / "sharded").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_have_the_same_architecture_and_tensors(tmp_path, name):
    source = open_checkpoint(GOLDEN / name)
    save(load(GOLDEN / name, dtype="bfloat16"), tmp_path / "out")
    ours, theirs = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", source.path)
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    assert open_checkpoint(tmp_path / "out").config == source.config


def test_kinds_of_layers_repeat():
    def period(**changes):
        return LlamaConfig.tiny(num_layers=12, **changes).layer_period

    assert period() == period(sliding_window=4) == 1
    assert period(no_rope_layers=(3, 7, 11)) == 4
    assert period(no_rope_layers=(3, 7)) == 12
    assert period(sliding_window=4, full_attention_layers=(1, 3, 5, 7, 9, 11)) == 2
    assert period(full_attention_layers=(1, 3)) == 1
