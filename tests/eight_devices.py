"""What holds on a mesh of eight devices; run by test_sharding.py in a process that has them."""

import json
import math
import os
import re
import tracemalloc
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import decode as decode_program
from lsjax.config import ConfigError, LlamaConfig, MeshConfig
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.loops import decode, prefill
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.self_speculative import Choices, SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.evaluation.exactness import FLOAT32_MARGIN, first_difference
from lsjax.model import checkpoint
from lsjax.model.checkpoint import (
    CheckpointError,
    assemble,
    load,
    open_source,
    parameter_reader,
)
from lsjax.model.huggingface import save
from lsjax.model.llama import Llama, stacked
from lsjax.sharding import make_mesh, placed, shardings
from tests.decoding.test_compiled import copies

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 7]
NEW, CAPACITY = 16, 613  # a capacity that no other array has as a dimension
DATA_AND_TENSOR = MeshConfig(data=4, tensor=2)
FEW_HEADS = MeshConfig(tensor=8)  # K = 2
ALL_AXES = MeshConfig(data=2, fsdp=2, tensor=2)
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=5)


def programs(model, strategy, prompts, mesh=None, sampling=GREEDY):
    """Model, state, the strategy's arguments and the two programs, all of it on the mesh."""
    model = placed(model, mesh)
    state = DecodeState.create(
        model.config,
        prompts,
        [NEW] * len(prompts),
        [[-1]] * len(prompts),
        capacity=CAPACITY,
        slack=strategy.slack,
        num_layers=strategy.depth(model.config),
        dtype=model.dtype,
        stacked=model.is_stacked,
        sampling=[sampling] * len(prompts),
        mesh=mesh,
    )
    arguments = placed(strategy.arguments(model), mesh)
    compile_ = partial(jax.jit, donate_argnums=1, out_shardings=mesh and shardings(state, mesh))
    depth = strategy.depth(model.config)
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        first = compile_(partial(prefill, chunk=32, depth=depth)).lower(model, state, np.int32(0))
        rest = compile_(partial(decode, strategy=strategy))
        rest = rest.lower(model, state, np.int32(NEW), arguments)
        return model, state, arguments, first.compile(), rest.compile()


def tokens(model, state, settings, run_prefill, run_decode) -> list[list[int]]:
    starts = np.asarray(state.length_B)
    state = run_prefill(model, state, np.int32(0))
    while np.asarray(state.running_B).any():
        state = run_decode(model, state, np.int32(NEW), settings)
    rows = zip(np.asarray(state.tokens_BS), starts, np.asarray(state.length_B), strict=True)
    return [row[start:end].tolist() for row, start, end in rows]


# Each strategy, each kind of state and each form of the model on some mesh.
VOCABULARY = DraftVocabulary(np.arange(0, 258, 2))
CASES = [
    (DATA_AND_TENSOR, SelfSpeculative(2, 2, VOCABULARY), DRAWN, "separate"),
    (DATA_AND_TENSOR, SelfSpeculative(2, 2), GREEDY, "stacked"),
    (FEW_HEADS, SelfSpeculative(2, 2, VOCABULARY), GREEDY, "separate"),
    (FEW_HEADS, EarlyExit(2), GREEDY, "separate"),
    (ALL_AXES, SelfSpeculative(2, 2, choices=Choices((1, 2), (0, 2))), GREEDY, "separate"),
]


@pytest.fixture(scope="module")
def model() -> Llama:
    return jax.jit(lambda: Llama(LlamaConfig.tiny(num_layers=3), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def greedy(model):
    return tokens(*programs(model, Autoregressive(), PROMPTS))


@pytest.mark.parametrize("mesh, strategy, sampling, form", CASES)
def test_tokens_of_one_device(model, greedy, mesh, strategy, sampling, form):
    """And the program for the mesh copies and gathers nothing large in its loop."""
    as_formed = stacked(model) if form == "stacked" else model
    found = programs(as_formed, strategy, PROMPTS, make_mesh(mesh), sampling)
    check_loop(found[-1].as_text(), model)
    found = tokens(*found)
    if sampling is not GREEDY or strategy.depth(model.config) < model.config.num_layers:
        assert found == tokens(*programs(as_formed, strategy, PROMPTS, None, sampling))
        return
    for prompt, expected, new in zip(PROMPTS, greedy, found, strict=True):
        difference = first_difference(model, prompt, expected, new)
        assert difference is None or difference.margin < FLOAT32_MARGIN, difference


def check_loop(text: str, model: Llama) -> None:
    """No copy of a cache, and nothing sent that is as large as the smallest matrix of weights."""
    assert not [shape for _, shape in copies(text) if CAPACITY in shape and len(shape) > 2]
    sent = collectives(text)
    assert sent and not [shape for shape in sent if CAPACITY in shape]
    assert max(map(math.prod, sent)) < model.config.hidden_size**2


def test_what_a_step_sends(model):
    """What tensor parallelism needs: two sums for a layer and one for the embedding, and the best
    logit of each device with its index, not the logits. And whether to go on."""
    *_, program = programs(model, Autoregressive(), PROMPTS, make_mesh(DATA_AND_TENSOR))
    sums = [(1, 1, model.config.hidden_size)] * (2 * model.config.num_layers + 1)
    assert sorted(collectives(program.as_text())) == sorted([*sums, (1, 2), (1, 2), (), ()])


def collectives(text: str) -> list[tuple[int, ...]]:
    """Shapes of what devices send each other."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return [
        tuple(int(size) for size in shape.split(",") if size)
        for results in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", results)
    ]


@pytest.fixture(scope="module")
def texts(model, tokenizer) -> list[list[int]]:
    engine = Engine(model, tokenizer)
    return [c.token_ids for c in engine.generate([*PROMPTS, "abc"], max_new_tokens=NEW)]


def test_engine(model, tokenizer, texts):
    """Batches that are not full, rows that end early, a second strategy in the same engine."""
    mesh = make_mesh(DATA_AND_TENSOR)
    engine = Engine(model, tokenizer, Autoregressive(), batch_size=4, mesh=mesh)
    found = engine.generate([*PROMPTS, "abc"], max_new_tokens=NEW)
    assert [completion.token_ids for completion in found] == texts
    engine.use(SelfSpeculative(2, 2))
    stop = found[1].text[3:6]
    found = engine.generate([*PROMPTS, "abc"], max_new_tokens=NEW, stop=[stop])
    assert found[1].finish_reason == "stop"
    for completion, tokens in zip(found, texts, strict=True):
        assert completion.token_ids == tokens[: completion.num_new_tokens]


def test_decode_program(model, tokenizer, texts, tmp_path):
    """The data axis may be longer than the list of prompts."""
    save(model, tmp_path / "model", tokenizer=tokenizer)
    options = f"--prompt abc --max-new-tokens {NEW} --mesh.data 2 --mesh.tensor -1 --batch-size 8"
    output = tmp_path / "out.jsonl"
    with patch.dict(os.environ, LSJAX_CACHE=str(tmp_path)):
        model, output = ["--model", str(tmp_path / "model")], ["--json", str(output)]
        assert decode_program.main([*options.split(), *model, *output]) == 0
    assert json.loads(Path(output[1]).read_text())["token_ids"] == texts[-1]


def test_engine_refuses_a_batch_that_the_data_axis_does_not_divide(model, tokenizer):
    with pytest.raises(ConfigError, match="batch size 6 does not divide into the mesh's data axis"):
        Engine(model, tokenizer, batch_size=6, mesh=make_mesh(DATA_AND_TENSOR))


class Counted(np.ndarray):
    """A tensor of a file that tells `count` what is sliced out of it."""

    def __array_finalize__(self, base):
        self.count = getattr(base, "count", None)

    def __getitem__(self, index):
        piece = super().__getitem__(index)
        self.count(piece)
        return piece


class CountingSource:
    """A source that counts how often each number of each tensor is read."""

    def __init__(self, source):
        self.path, self.config, self.shapes = source.path, source.config, source.shapes
        self.where, self._source = source.where, source
        self.counts = {name: np.zeros(shape, np.int64) for name, shape in source.shapes.items()}

    def read(self, name: str) -> np.ndarray:
        tensor, flat = self._source.read(name).view(Counted), self.counts[name].reshape(-1)
        origin = tensor.ctypes.data

        def count(piece):
            first = (piece.ctypes.data - origin) // piece.itemsize
            strides = [stride // piece.itemsize * flat.itemsize for stride in piece.strides]
            np.lib.stride_tricks.as_strided(flat[first:], piece.shape, strides)[...] += 1

        tensor.count = count
        return tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint whose largest tensor is its embedding."""
    config = LlamaConfig.tiny(num_layers=2, vocab_size=4096, attention_bias=True, mlp_bias=True)
    path = tmp_path_factory.mktemp("saved") / "model"
    save(jax.jit(lambda: Llama(config, rngs=nnx.Rngs(1)))(), path)
    return path


@pytest.mark.parametrize(
    "mesh, dtype",
    [
        (MeshConfig(data=8), jnp.float32),
        (DATA_AND_TENSOR, jnp.bfloat16),
        (ALL_AXES, jnp.float32),
        (MeshConfig(tensor=8), jnp.bfloat16),
    ],
)
def test_each_shard_is_read_once(saved, mesh, dtype, monkeypatch):
    """Every number once, whether devices share it or not; and never more than a shard is held."""
    held, largest = [], 4096 * 64 * jnp.dtype(dtype).itemsize

    def measured(*arguments):
        read = parameter_reader(*arguments)

        def measure(index):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            shard = read(index)
            held.append(tracemalloc.get_traced_memory()[1] - before)
            return shard

        return measure

    monkeypatch.setattr(checkpoint, "parameter_reader", measured)
    source, mesh = CountingSource(open_source(saved)), make_mesh(mesh)
    tracemalloc.start()
    model = assemble(source, dtype=dtype, mesh=mesh)
    tracemalloc.stop()
    assert all((counts == 1).all() for counts in source.counts.values())
    smallest_part = 1 if mesh.shape["tensor"] * mesh.shape["fsdp"] == 1 else 2
    assert max(held) <= largest / smallest_part + 20_000  # and the objects of Python
    for placed_, whole in zip(
        jax.tree.leaves(model), jax.tree.leaves(load(saved, dtype=dtype)), strict=True
    ):
        np.testing.assert_array_equal(placed_, whole)
    expected = jax.tree.leaves(shardings(model, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(model)] == expected


def test_damage_in_any_shard_is_found(saved, tmp_path):
    model = load(saved)
    gate_up = model.layers[1].feed_forward.gate_up.kernel
    gate_up[...] = gate_up[...].at[63, 1, 127].set(jnp.nan)
    save(model, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight': 1 of \d+ values are"):
        load(tmp_path / "damaged", mesh=make_mesh(DATA_AND_TENSOR))
