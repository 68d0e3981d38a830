"""int8 weights: against plain arithmetic in float64, through files, and in every strategy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import lsjax
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.int8_drafts import Int8Drafts
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.int8 import Int8Linear, Int8Rows, rounded
from lsjax.model.llama import Llama, unstacked
from lsjax.model.matrices import with_int8
from lsjax.model.parameters import named_leaves
from tests.marks import long

SHAPES = {
    "tied": lsjax.LlamaConfig.tiny(tie_embeddings=True),
    "untied with biases": lsjax.LlamaConfig.tiny(
        tie_embeddings=False, attention_bias=True, mlp_bias=True
    ),
}


@pytest.fixture(scope="module", params=["tied", *long("untied with biases")])
def plain(request) -> Llama:
    config = SHAPES[request.param]
    return unstacked(jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))())


def widened(kernel):
    """What the integers stand for, in float64: the nearest of 255 steps."""
    kernel = np.asarray(kernel, np.float64)
    step = np.abs(kernel).max(0) / 127
    return np.clip(np.rint(kernel / np.where(step > 0, step, 1)), -127, 127) * step


def test_rounding_by_hand():
    kernel = jnp.array([[127.0, 0.0, -1.0], [63.5, 0.0, 0.25], [-0.5, 0.0, 0.004]])
    integers, scale = rounded(kernel)
    np.testing.assert_array_equal(integers, [[127, 0, -127], [64, 0, 32], [0, 0, 1]])
    np.testing.assert_allclose(scale, [1, 1, 1 / 127], rtol=1e-6)
    assert integers.dtype == jnp.int8


@pytest.mark.parametrize("shape", [(24, 16), (24, 2, 8), (24, 2, 3, 4)])
def test_products_are_those_of_the_rounded_matrix(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (2, 3, 24))
    bias = nnx.Param(jax.random.normal(jax.random.key(2), shape[1:]))
    found = Int8Linear(rounded(kernel), bias)(x)
    expected = np.tensordot(np.asarray(x, np.float64), widened(kernel), 1) + np.asarray(bias[...])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    off = np.abs(np.asarray(kernel) - widened(kernel)).max(0)
    assert (off <= np.abs(kernel).max(0) / 254 + 1e-6).all()


def test_logits_are_those_of_the_rounded_model(plain):
    """In float64: a model whose matrices and head are what the integers stand for."""
    found, tokens = jax.jit(with_int8)(plain), jnp.arange(24)[None]
    own, wide = named_leaves(found), []
    with jax.enable_x64(True):
        for name, leaf in named_leaves(plain).items():
            leaf = jnp.asarray(leaf, jnp.float64)
            if name.endswith("kernel"):
                leaf = own[name] * jnp.asarray(own[f"{name}_scale"], jnp.float64)
            wide.append(leaf)
        reference = jax.tree.unflatten(jax.tree.structure(plain), wide)
        table = own["head.rows"] * jnp.asarray(own["head.scale"], jnp.float64)[:, None]
        states = reference.exits(tokens)[-1]
        expected = np.asarray(reference.unembed(states, table))
        states = jnp.asarray(states, jnp.float32)
    np.testing.assert_allclose(found(tokens), expected, atol=1e-3)
    assert np.abs(np.asarray(plain(tokens)) - expected).max() > 0.01
    ids = jnp.array([3, 5, 200])
    some = found.unembed(states, found.head_rows(ids))
    np.testing.assert_allclose(some, expected[..., ids], atol=1e-3)
    assert isinstance(found.head_rows(ids), Int8Rows)


def test_only_matrices_and_the_head_are_rounded(plain):
    before, after = named_leaves(plain), named_leaves(with_int8(plain))
    integers = {name for name, leaf in after.items() if leaf.dtype == jnp.int8}
    assert integers == {*(name for name in before if name.endswith("kernel")), "head.rows"}
    for name in before.keys() - integers - {"head"}:
        np.testing.assert_array_equal(after[name], before[name])
    own, half = (with_int8(plain).bytes_per_token(), plain.bytes_per_token() // 4)
    assert own == half


def test_rounded_while_reading(plain, tmp_path):
    """The same bits as rounding the loaded model."""
    lsjax.save(plain, tmp_path / "model")
    found = lsjax.load(tmp_path / "model", weights="int8")
    expected = with_int8(lsjax.load(tmp_path / "model"))
    own = named_leaves(found)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_array_equal(own[name], leaf)


def test_a_rounded_model_is_saved_and_read(plain, tmp_path):
    """In the format of compressed-tensors, bit for bit. Read as floats, it is what the integers
    stand for. A tied head is a head of its own then."""
    model = jax.jit(with_int8)(plain)
    lsjax.save(model, tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "int-quantized"
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as file:
        name = "model.layers.1.mlp.up_proj.weight"
        integers, scale = file.get_tensor(name), file.get_tensor(f"{name}_scale")
    config = plain.config
    assert integers.dtype == np.int8
    assert integers.shape == (config.intermediate_size, config.hidden_size)
    assert scale.shape == (config.intermediate_size, 1)
    kernel = np.asarray(plain.layers[1].feed_forward.gate_up.kernel[...])[:, 1]
    np.testing.assert_allclose(
        integers * scale, widened(kernel).T, atol=1e-2 * np.abs(kernel).max()
    )
    own = named_leaves(lsjax.load(tmp_path / "model", weights="int8"))
    expected = named_leaves(model)
    assert own.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(own[name], leaf)
    wide = lsjax.load(tmp_path / "model")
    tokens = jnp.arange(24)[None]
    np.testing.assert_allclose(wide(tokens), model(tokens), atol=1e-3)


def test_other_granularities_are_refused(plain, tmp_path):
    lsjax.save(jax.jit(with_int8)(plain), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "group"
    file.write_text(json.dumps(raw))
    with pytest.raises(lsjax.CheckpointError, match="only int8 with a symmetric scale"):
        lsjax.load(tmp_path / "model")
    raw["quantization_config"] = {"quant_method": "awq"}
    file.write_text(json.dumps(raw))
    with pytest.raises(lsjax.CheckpointError, match="quantization_config is"):
        lsjax.load(tmp_path / "model")


@pytest.mark.long
@pytest.mark.parametrize("exits", [(), (1, 2)])
def test_rounded_drafts_leave_the_text_as_it_is(plain, exits):
    """An int8 head for every strategy, with a draft vocabulary or without; and int8 layers. With
    exit blocks too. Drafts differ from those of the full weights, so some are rejected."""
    model, prompts = with_exit_blocks(plain, exits), ["hello", "abc"]
    few = lsjax.DraftVocabulary(np.arange(0, 256, 2, dtype=np.int32), is_int8=True)
    every = lsjax.DraftVocabulary.every(plain.vocab_size)
    strategies = [
        lsjax.Autoregressive(),
        lsjax.SelfSpeculative(2, 3, every),
        lsjax.SelfSpeculative(2, 3, few),
        lsjax.Adaptive((1, 2), every),
    ]
    if not exits:  # blocks draft from exact states
        strategies += [Int8Drafts(2, 3), Int8Drafts(2, 3, few, draft_confidence=0.01)]
    texts, accepted = [], []
    for strategy in strategies:
        engine = lsjax.Engine(model, ByteTokenizer(), strategy, batch_size=2, ignore_end=True)
        done = engine.generate(prompts, max_new_tokens=40)
        texts.append([one.token_ids for one in done])
        accepted.append(sum(one.accepted for one in done))
    assert all(text == texts[0] for text in texts)
    assert accepted[1] > 0 and (exits or accepted[4] > 0)
    if exits:
        engine.use(Int8Drafts(2, 3))
        with pytest.raises(lsjax.ConfigError, match="exit 2 has an exit block"):
            engine.generate(prompts)


@pytest.mark.long
def test_drafts_of_rounded_layers_are_those_of_a_rounded_model(plain):
    """Drafts of the last exit but one agree nearly always with those of the exit itself."""
    found = []
    for kind in (lsjax.SelfSpeculative, Int8Drafts):
        engine = lsjax.Engine(plain, ByteTokenizer(), kind(3, 2), ignore_end=True)
        (done,) = engine.generate(["hello"], max_new_tokens=60)
        found.append(done.acceptance_rate)
    assert found[1] == pytest.approx(found[0], abs=0.15)


def test_drafts_of_int8_layers_leave_the_text_as_it_is(plain):
    """Fewer strategies, for the short set."""
    texts = []
    for strategy in (lsjax.Autoregressive(), Int8Drafts(2, 3)):
        engine = lsjax.Engine(plain, ByteTokenizer(), strategy, ignore_end=True)
        texts.append(engine.generate(["hello"], max_new_tokens=24)[0].token_ids)
    assert texts[0] == texts[1]


def test_an_int8_head_of_all_tokens_is_no_draft_vocabulary_otherwise(plain):
    every = np.arange(plain.vocab_size, dtype=np.int32)
    with pytest.raises(lsjax.ConfigError, match="does not make the head"):
        lsjax.DraftVocabulary(every).validate(plain)
    lsjax.DraftVocabulary.every(plain.vocab_size).validate(plain)


@pytest.mark.long
def test_drafts_of_rounded_models_are_lossless(plain):
    """Self-speculation equals autoregressive decoding with the same weights."""
    model, prompts = with_int8(plain), ["hello", "abc"]
    texts = []
    for strategy in (
        lsjax.Autoregressive(),
        lsjax.SelfSpeculative(2, 3),
        lsjax.Adaptive((1, 2)),
    ):
        engine = lsjax.Engine(model, ByteTokenizer(), strategy, batch_size=2, ignore_end=True)
        done = engine.generate(prompts, max_new_tokens=40)
        texts.append([one.token_ids for one in done])
    assert texts[0] == texts[1] == texts[2]
