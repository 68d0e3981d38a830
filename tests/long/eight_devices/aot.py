"""Programs lowered from shapes alone, compiled for eight devices, and what they cost there."""

import dataclasses
import math
import re
from functools import partial

import jax
import pytest

from lsjax.aot.chips import CHIPS
from lsjax.aot.costs import CostAnalysis, ProgramCosts, Trips
from lsjax.aot.decoding import (
    DecodingShape,
    Round,
    decode_program,
    prefill_program,
    round_trips,
)
from lsjax.aot.hlo import parse
from lsjax.aot.programs import evaluation, train_step
from lsjax.config import (
    ConfigError,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    TrainConfig,
)
from lsjax.evaluation.exits import exit_sums
from lsjax.sharding import make_mesh
from lsjax.training.step import abstract_state

CONFIG = TrainConfig(
    model=LlamaConfig.tiny(num_layers=2, vocab_size=250),
    num_steps=10,
    batch_size=8,
    seq_len=12,
    layer_dropout=LayerDropoutConfig(p_max=0.5),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=1, weights="uniform"),
    remat="nothing_saveable",
    mesh=MeshConfig(data=2, fsdp=4),
)


def costs_of(compiled, mesh, trips: Trips) -> ProgramCosts:
    return CostAnalysis(parse(compiled.as_text()), dict(mesh.shape), trips, CHIPS[0]).program()


def found(trips: Trips, op_name: str) -> float | None:
    return next((count for name, count in trips.items() if re.search(name, op_name)), None)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(CONFIG.mesh, jax.devices())


def test_the_step(mesh):
    """All loops are known; each layer's four matrices are gathered in its turn, forward and
    backward, and no more than one layer's at once; nothing has the size of the logits."""
    lowered, trips = train_step(CONFIG, mesh)
    compiled = lowered.compile()
    costs = costs_of(compiled, mesh, trips)
    assert not costs.unknown_loops
    model, layers = CONFIG.model, CONFIG.model.num_layers
    gathers = {
        one: count
        for one, count in costs.collectives.items()
        if one.kind == "all-gather" and one.axes == ("fsdp",) and one.bytes > 1024
    }
    assert sum(count for count in gathers.values()) >= 2 * 4 * layers
    largest = max(model.layer_params, model.head_params)
    rows = CONFIG.batch_size * CONFIG.seq_len // mesh.size
    logits = rows * model.vocab_size
    for one in costs.collectives:
        assert one.bytes <= 4 * largest, one
        assert one.bytes != 4 * logits, one
    # The state comes in once, in shares.
    leaves = jax.tree.leaves(abstract_state(CONFIG, mesh))
    state = sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    batch = 4 * 4 * rows
    assert compiled.memory_analysis().argument_size_in_bytes == state + batch


@pytest.mark.parametrize("parts", [1, 16])
def test_the_evaluation(mesh, parts):
    """Needs no more memory than the step, and the head's table is gathered once."""
    config = dataclasses.replace(CONFIG, micro_batches=parts, batch_size=128)
    programs = {}
    for name, lower in (
        ("step", train_step),
        ("evaluation", partial(evaluation, score=exit_sums)),
    ):
        lowered, trips = lower(config, mesh)
        programs[name] = lowered.compile()
    step, scoring = (program.memory_analysis() for program in programs.values())
    assert scoring.temp_size_in_bytes <= step.temp_size_in_bytes
    costs = costs_of(programs["evaluation"], mesh, trips)
    assert not costs.unknown_loops
    table = config.model.vocab_size * config.model.hidden_size * 4
    gathered = [n for one, n in costs.collectives.items() if one.bytes == table]
    assert gathered == [1]


def test_trips_of_the_exits(mesh):
    """Exit 1 at each step, with every position."""
    _, trips = train_step(CONFIG, mesh)
    assert found(trips, "jit(train_step)/jvp()/shard_map/exits/while") == 1
    inner = "jit(train_step)/jvp()/shard_map/exits/while/body/loss_chunks/while"
    assert found(trips, inner) == 1
    assert found(trips, "jit(train_step)/jvp()/while") is None


def test_decoding(mesh):
    """Prefill and a round of self-speculation on two devices that share out the heads."""
    few = make_mesh(MeshConfig(tensor=2), jax.devices())
    asked = DecodingShape(prompt_tokens=300, num_draft_tokens=3)
    prompt, chunks = prefill_program(CONFIG.model, asked, few, dtype=jax.numpy.float32)
    rounds = decode_program(CONFIG.model, asked, 2, few, dtype=jax.numpy.float32)
    trips = round_trips(CONFIG.model, asked, Round(1, 3))
    for lowered, known in ((prompt, chunks), (rounds, trips)):
        costs = costs_of(lowered.compile(), few, known)
        assert not costs.unknown_loops
        assert {one.axes for one in costs.collectives} == {("tensor",)}
    assert found(trips, "jit(run)/rounds/while") == 1
    assert found(trips, "jit(run)/rounds/while/body/draft/while") == 4
    with pytest.raises(ConfigError, match="prompt-tokens 99999 is beyond"):
        decode_program(CONFIG.model, DecodingShape(prompt_tokens=99999), 1, few)
