"""What XLA makes of the decode loops: nothing large is copied in them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.compiler import Programs
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.programs import decode
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from tests.marks import long
from tests.states import new_state


@pytest.fixture(scope="module")
def model(deep):
    return deep


def compiled_loop(model, strategy, batch, capacity):
    state = new_state(
        model.config,
        [Request(prompt=[1, 2, 3], max_new_tokens=9)] * batch,
        capacity=capacity,
        num_layers=strategy.depth(model.config),
        dtype=jnp.float32,
        learned=strategy.first_guess(batch),
    )
    program = jax.jit(partial(decode, strategy=strategy), donate_argnums=1)
    arguments = strategy.arguments(model)
    return program.lower(model, state, np.int32(9), arguments).compile(), state


def copies(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(computation, shape) of every copy in a compiled program, the entry's own left out: it
    runs once."""
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = "" if header[1] else header[2]
        if computation and (copy := re.search(r"= \w+\[([\d,]+)\]\S* copy\(", line)):
            found.append((computation, tuple(map(int, copy[1].split(",")))))
    return found


# Capacities below and above LARGE, numbers that no other array has as a dimension.
@pytest.mark.parametrize("batch, capacity", [(1, 1613), *long((9, 613))])
@pytest.mark.parametrize(
    "strategy",
    [
        SelfSpeculative(2, 3),
        *long(
            Autoregressive(),
            EarlyExit(2),
            SelfSpeculative(2, 3, draft_confidence=0.5),
            SelfSpeculative(2, 3, DraftVocabulary(np.arange(50))),
            Adaptive((1, 2), lengths=(0, 2, 3)),
        ),
    ],
    ids=[
        "self_speculative",
        "autoregressive",
        "early_exit",
        "confidence",
        "draft_vocabulary",
        "auto",
    ],
)
def test_no_copy_of_weights_or_cache_in_the_loop(model, strategy, batch, capacity):
    program, state = compiled_loop(model, strategy, batch, capacity)
    smallest = min(leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim > 1)
    large = [
        copy
        for copy in copies(program.as_text())
        if np.prod(copy[1]) >= smallest or (capacity in copy[1] and len(copy[1]) > 2)
    ]
    assert not large
    # What the program needs beside its arguments is less than one layer's keys and values.
    memory = program.memory_analysis()
    layer = 2 * state.cache.keys[0].nbytes
    assert memory.temp_size_in_bytes < layer
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state.cache))


def test_the_search_for_copies_finds_one():
    """A loop that swaps two buffers has to copy."""
    swap = jax.jit(lambda x, y: jax.lax.fori_loop(0, 3, lambda _, pair: pair[::-1], (x, y)))
    text = swap.lower(jnp.zeros((64, 64)), jnp.ones((64, 64))).compile().as_text()
    assert any(shape == (64, 64) for _, shape in copies(text))


def test_programs_have_no_code_lines(model):
    """TPUs' compiler can join stacks of code lines to a circle."""
    state = new_state(
        model.config,
        [Request(prompt=[1, 2, 3], max_new_tokens=9)],
        capacity=32,
        num_layers=1,
        dtype=jnp.float32,
    )
    before = jax.config.jax_traceback_in_locations_limit
    strategy = EarlyExit(1)
    function = partial(decode, strategy=strategy)
    rest = (state, np.int32(9), strategy.arguments(model))
    lowered = Programs(model).lower(function, *rest), jax.jit(function).lower(model, *rest)
    ours, plain = (program.as_text(debug_info=True) for program in lowered)
    assert "programs.py" in plain and "programs.py" not in ours
    assert jax.config.jax_traceback_in_locations_limit == before
