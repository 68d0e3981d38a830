"""Decoding on a mesh; run by test_eight_devices.py in a process that has eight devices."""

import json
import math
import os
import re
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.checkpoints.huggingface import save
from lsjax.cli.main import main
from lsjax.config import GREEDY, ConfigError, LlamaConfig, MeshConfig, Sampling
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.compiler import Programs
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.comparison import FLOAT32_MARGIN, first_difference
from lsjax.evaluation.exits import score_texts
from lsjax.model.llama import Llama, stacked
from lsjax.model.parameters import placed
from lsjax.sharding import make_mesh
from tests.decoding.test_compiled import copies
from tests.states import new_state

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 7]
NEW, CAPACITY = 16, 613  # a capacity that no other array has as a dimension
DATA_AND_TENSOR = MeshConfig(data=4, tensor=2)
FEW_HEADS = MeshConfig(tensor=8)  # K = 2
ALL_AXES = MeshConfig(data=2, fsdp=2, tensor=2)
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=5)


def programs(model, strategy, mesh=None, sampling=GREEDY):
    """A state with the prompts, the strategy's arguments and the two programs, on the mesh."""
    model, depth = placed(model, mesh), strategy.depth(model.config)
    state = new_state(
        model.config,
        [Request(prompt=ids, max_new_tokens=NEW, sampling=sampling) for ids in PROMPTS],
        capacity=CAPACITY,
        num_layers=depth,
        dtype=model.dtype,
        learned=strategy.first_guess(len(PROMPTS)),
        mesh=mesh,
    )
    arguments, get = placed(strategy.arguments(model), mesh), Programs(model, mesh).get
    run_prefill = get(partial(prefill, chunk=32, depth=depth), state, np.int32(0))
    run_decode = get(partial(decode, strategy=strategy), state, np.int32(NEW), arguments)
    return state, arguments, run_prefill, run_decode


def tokens(state, arguments, run_prefill, run_decode) -> list[list[int]]:
    starts = np.asarray(state.length_B)
    state = run_prefill(state, np.int32(0))
    while np.asarray(state.running_B).any():
        state = run_decode(state, np.int32(NEW), arguments)
    rows = zip(np.asarray(state.tokens_BS), starts, np.asarray(state.length_B), strict=True)
    return [row[start:end].tolist() for row, start, end in rows]


# Of rounds with lookups or no drafts, and with each exit.
SECONDS = ((1.0, 1.2, 1.4), (math.inf, 1.1, 1.3), (math.inf, 1.2, 1.5))
# Each strategy, each kind of state and each form of the model on some mesh.
VOCABULARY = DraftVocabulary(np.arange(0, 258, 2))
CASES = [
    (DATA_AND_TENSOR, SelfSpeculative(2, 2, VOCABULARY), DRAWN, "separate"),
    (DATA_AND_TENSOR, SelfSpeculative(2, 2), GREEDY, "stacked"),
    (FEW_HEADS, SelfSpeculative(2, 2, VOCABULARY), GREEDY, "separate"),
    (FEW_HEADS, EarlyExit(2), GREEDY, "separate"),
    (ALL_AXES, SelfSpeculative(2, 2, draft_confidence=0.3), GREEDY, "separate"),
    (ALL_AXES, Adaptive((1, 2), VOCABULARY, (0, 1, 2), SECONDS), GREEDY, "separate"),
]


@pytest.fixture(scope="module")
def model() -> Llama:
    return jax.jit(lambda: Llama(LlamaConfig.tiny(num_layers=3), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def greedy(model):
    return tokens(*programs(model, Autoregressive()))


@pytest.mark.parametrize("mesh, strategy, sampling, form", CASES)
def test_tokens_of_one_device(model, greedy, mesh, strategy, sampling, form):
    """And the program for the mesh copies and gathers nothing large in its loop."""
    as_formed = stacked(model) if form == "stacked" else model
    found = programs(as_formed, strategy, make_mesh(mesh), sampling)
    check_loop(found[-1].func.as_text(), model)
    found = tokens(*found)
    if sampling is not GREEDY or strategy.depth(model.config) < model.config.num_layers:
        assert found == tokens(*programs(as_formed, strategy, None, sampling))
        return
    for prompt, expected, new in zip(PROMPTS, greedy, found, strict=True):
        difference = first_difference(model, prompt, expected, new)
        assert difference is None or difference.margin < FLOAT32_MARGIN, difference


def check_loop(text: str, model: Llama) -> None:
    """No copy of a cache, and nothing sent that is as large as the smallest matrix of weights."""
    assert not [shape for _, shape in copies(text) if shape[-2:-1] == (CAPACITY,)]  # [B, K, S, H]
    sent = collectives(text)
    assert sent and not [shape for shape in sent if CAPACITY in shape]
    assert max(map(math.prod, sent)) < model.config.hidden_size**2


def test_what_a_step_sends(model):
    """What tensor parallelism needs: two sums for a layer and one for the embedding, and the best
    logit of each device with its index, not the logits. And whether to go on."""
    *_, program = programs(model, Autoregressive(), make_mesh(DATA_AND_TENSOR))
    sums = [(1, 1, model.config.hidden_size)] * (2 * model.config.num_layers + 1)
    assert sorted(collectives(program.func.as_text())) == sorted([*sums, (1,), (1,), (), ()])


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


def test_a_single_row_is_computed_on_all_devices(model, tokenizer, texts):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    (found,) = Engine(model, tokenizer, mesh=mesh).generate([PROMPTS[1]], max_new_tokens=NEW)
    assert found.token_ids == texts[1]


def test_decode_program(model, tokenizer, texts, tmp_path):
    """The data axis may be longer than the list of prompts."""
    save(model, tmp_path / "model", tokenizer=tokenizer)
    options = f"--prompt abc --max-new-tokens {NEW} --mesh.data 2 --mesh.tensor -1 --batch-size 8"
    output = tmp_path / "out.jsonl"
    with patch.dict(os.environ, LSJAX_CACHE=str(tmp_path)):
        model, output = ["--model", str(tmp_path / "model")], ["--json", str(output)]
        assert main(["decode", *options.split(), *model, *output]) == 0
    assert json.loads(Path(output[1]).read_text())["token_ids"] == texts[-1]


def test_scores(model):
    """Rows of different length, some of them fillers."""
    texts = [(prompt, len(prompt) - 1) for prompt in PROMPTS]
    expected = score_texts(model, texts, exit_layer=2, batch_size=8)
    mesh = make_mesh(DATA_AND_TENSOR)
    found = score_texts(placed(model, mesh), texts, exit_layer=2, batch_size=8, mesh=mesh)
    (found, found_greedy), (expected, greedy) = (
        zip(*scores, strict=True) for scores in (found, expected)
    )
    assert found_greedy == greedy
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_engine_refuses_a_batch_that_the_data_axis_does_not_divide(model, tokenizer):
    with pytest.raises(ConfigError, match="batch size 6 is not a multiple of the mesh's data axis"):
        Engine(model, tokenizer, batch_size=6, mesh=make_mesh(DATA_AND_TENSOR))


def test_ended_rows_leave_a_batch_on_a_mesh():
    """Rows stay on their axis, which has at least one each."""
    config = LlamaConfig.tiny(num_layers=3, init_std=0.2)
    model = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    settings = dict(batch_size=4, ignore_end=True, mesh=mesh)
    requests = [Request(prompt=[7, at], max_new_tokens=4 + 9 * at) for at in range(5)]
    engines = (
        Engine(model, ByteTokenizer(), SelfSpeculative(1, 3), **settings, long_lived=long_lived)
        for long_lived in (False, True)
    )
    one, other = ([text.token_ids for text in engine.generate(requests)] for engine in engines)
    assert one == other
