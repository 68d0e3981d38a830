"""What an engine does, counted."""

import pytest

from lsjax.decoding.loops import prefill


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
