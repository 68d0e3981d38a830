"""What an engine does, counted; the strategies that must give the same text."""

import numpy as np
import pytest

from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.programs import prefill
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from tests.marks import long


@pytest.fixture(
    params=[
        SelfSpeculative(3, 4),
        SelfSpeculative(3, 4, DraftVocabulary(np.arange(0, 258, 2))),
        *long(Autoregressive(), EarlyExit(4)),
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
