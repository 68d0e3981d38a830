"""Every family against transformers: each field of its configuration, and several shapes.

    make peers
    python -m pytest tests/proofs/test_families.py

Models are tiny and random. A value of a field either gives transformers' logits, or is refused.
Skipped without transformers. Golden files stand in for it elsewhere (tests/golden).
"""

import copy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.checkpoints import load
from lsjax.checkpoints.families import FAMILIES
from lsjax.checkpoints.huggingface import save
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.cache import KVCache
from lsjax.model.exit_model import first_layers

transformers = pytest.importorskip("transformers", reason="needs transformers: make peers")
torch = pytest.importorskip("torch", reason="needs torch: make peers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs

STEPS, TOLERANCE = 24, 2e-4
KINDS = sorted(family.model_type for family in FAMILIES.values())
BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# Windows and layers without rope matter within STEPS.
OWN = {
    "mistral": dict(sliding_window=6),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, head_dim=8),
    "smollm3": dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7),
    "olmo3": dict(sliding_window=5),
}
ROPE = (
    dict(rope_type="default", rope_theta=300.0),
    dict(rope_type="linear", rope_theta=1e4, factor=3.0),
    dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0)
    | dict(high_freq_factor=4.0, original_max_position_embeddings=16),
    dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16),
    dict(rope_type="yarn", rope_theta=100.0, factor=2.0),
    dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
    | dict(beta_fast=4.0, beta_slow=0.5, truncate=False, attention_factor=0.7),
    dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
    | dict(mscale=0.8, mscale_all_dim=0.5),
    dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    dict(rope_type="longrope", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32)
    | dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4),
)
REFUSED = ("gelu", "dynamic", "longrope")
S, F = "sliding_attention", "full_attention"
CHANGES = {
    "vocab_size": (80,),
    "hidden_size": (48,),
    "intermediate_size": (40,),
    "num_hidden_layers": (1, 3, 6),
    "num_attention_heads": (8,),
    "num_key_value_heads": (1, 4, None),
    "head_dim": (12, None),
    "hidden_act": ("gelu",),
    "max_position_embeddings": (32,),
    "initializer_range": (0.1,),
    "rms_norm_eps": (1e-2,),
    "use_cache": (False,),
    "pad_token_id": (5, None),
    "bos_token_id": (7,),
    "eos_token_id": ([3, 4],),
    "pretraining_tp": (2,),
    "tie_word_embeddings": (True, False),
    "rope_parameters": ROPE,
    "attention_bias": (True,),
    "attention_dropout": (0.5,),
    "mlp_bias": (True,),
    "sliding_window": (1, 3, 100, None),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 2, 9),
    "layer_types": ([S] * 4, [F] * 4, [S, F, F, S], [F, S, F, S]),
    "no_rope_layers": ([1, 0, 0, 1], [1] * 4, [0] * 4, [1, 0, 1, 0, 1]),
    "no_rope_layer_interval": (1, 3, 9),
}
SHAPES = {
    "full heads": dict(num_key_value_heads=4),
    "one K/V head, untied": dict(num_key_value_heads=1, tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
    "heads apart from the width": dict(head_dim=12),
}


def fields(kind: str) -> list[str]:
    """The fields of a family's own, without those of all configurations."""
    found = type(transformers.AutoConfig.for_model(kind)).__annotations__
    return [name for name in found if name in CHANGES or not name.startswith(("base_", "keys_"))]


def make(kind: str, changes: dict, directory: Path):
    """A random model with norms and biases that are not all ones and zeros, as saved."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **copy.deepcopy(BASE | OWN.get(kind, {}) | changes)
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return read(directory)


def read(directory: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def exit_logits(model, tokens: np.ndarray) -> np.ndarray:
    out = model(torch.from_numpy(tokens), output_hidden_states=True)
    # The last hidden state has passed the final norm already.
    exits = [model.lm_head(model.model.norm(x)) for x in out.hidden_states[1:-1]] + [out.logits]
    return torch.stack(exits).numpy()


def random_tokens(size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(3, size, (2, STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_all_fields_are_changed(kind):
    assert set(fields(kind)) <= CHANGES.keys()


CASES = [
    pytest.param(kind, name, value, id=f"{kind}-{name}-{value}")
    for kind in KINDS
    for name in fields(kind)
    for value in CHANGES.get(name, ())
]


@pytest.mark.parametrize("kind, name, value", CASES)
def test_each_value_of_a_field_has_transformers_logits_or_is_refused(tmp_path, kind, name, value):
    try:
        original = make(kind, {name: value}, tmp_path / "theirs")
        expected = exit_logits(original, random_tokens())
    except Exception as error:  # of many kinds
        pytest.skip(f"transformers takes no such model: {error}")
    try:
        model = load(tmp_path / "theirs")
    except CheckpointError as error:
        assert any(word in str(value) for word in REFUSED), error
        return
    with jax.default_matmul_precision("highest"):
        logits = model.unembed(model.exits(jnp.asarray(random_tokens())))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    save(model, tmp_path / "ours")
    np.testing.assert_array_equal(exit_logits(read(tmp_path / "ours"), random_tokens()), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding(tmp_path, small_tokenizer, kind, shape):
    """A prompt and single tokens at every exit, past the window; self-speculation is lossless."""
    expected = exit_logits(make(kind, SHAPES[shape], tmp_path / "theirs"), random_tokens())
    model, tokens_BT = load(tmp_path / "theirs"), jnp.asarray(random_tokens())
    layers = model.config.num_layers

    @partial(jax.jit, static_argnums=0)
    def step(width, start, cache):
        at_BT = jnp.broadcast_to(start + jnp.arange(width), (2, width))
        x_BTD, exits = model.embed(jnp.take_along_axis(tokens_BT, at_BT, 1)), []
        for layer in range(layers):
            x_BTD, cache = model.run_layers(x_BTD, layer, layer + 1, at_BT, cache)
            exits.append(model.unembed(x_BTD))
        return jnp.stack(exits), cache

    cache, start, parts = KVCache.create(model.config, 2, 32, jnp.float32), 0, []
    with jax.default_matmul_precision("highest"):
        for width in (8, *[1] * 10, 3, 3):
            found, cache = step(width, start, cache)
            parts.append(found)
            start += width
    assert start == STEPS
    np.testing.assert_allclose(np.concatenate(parts, 2), expected, atol=TOLERANCE, rtol=0)
    prompts, texts = random_tokens()[:, :8].tolist(), []
    for strategy in (Autoregressive(), *(SelfSpeculative(e, 3) for e in range(1, layers))):
        engine = Engine(model, small_tokenizer, strategy, batch_size=2, ignore_end=True)
        texts.append([one.token_ids for one in engine.generate(prompts, max_new_tokens=40)])
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_exit_is_a_model_in_transformers(tmp_path, kind):
    """Its logits there are those of the exit of the whole model."""
    expected = exit_logits(make(kind, {}, tmp_path / "theirs"), random_tokens())
    save(first_layers(load(tmp_path / "theirs"), 3), tmp_path / "exit")
    shorter = read(tmp_path / "exit")
    assert shorter.config.num_hidden_layers == 3
    found = exit_logits(shorter, random_tokens())[-1]
    np.testing.assert_allclose(found, expected[2], atol=TOLERANCE, rtol=0)
