"""What an engine does, counted; the strategies that must give the same text."""

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.programs import prefill
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.model.llama import Llama
from tests.marks import long


@pytest.fixture(scope="session")
def model(shallow) -> Llama:
    """Here two layers are the usual model."""
    return shallow


@pytest.fixture(scope="session")
def deep(config) -> Llama:
    """Four layers, for tests of several exits."""
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(
    params=[
        SelfSpeculative(1, 4),
        SelfSpeculative(1, 4, DraftVocabulary(np.arange(0, 258, 2))),
        *long(Autoregressive(), EarlyExit(2)),
    ],
    ids=["self_speculative", "draft_vocabulary", "autoregressive", "early_exit"],
)
def strategy(request):
    """Each of those that give the whole tiny model's text."""
    return request.param


@pytest.fixture
def count_prefilled(monkeypatch):
    """Given an engine, a list that gets the number of prompt tokens of each prefill from now on:
    those that are run through the model, not those that are in the cache already."""

    def watch(engine) -> list[int]:
        counts, get = [], engine.programs.get

        def spy(function, state, *rest):
            program = get(function, state, *rest)
            if function.func is not prefill:
                return program

            def counted(state, start):
                counts.append(int(state.length_B.max()) - int(start))
                return program(state, start)

            return counted

        monkeypatch.setattr(engine.programs, "get", spy)
        return counts

    return watch
