"""Programs that are compiled side by side, for people who wait, and found again on disk."""

from contextlib import contextmanager
from functools import partial
from threading import Barrier

import jax
import numpy as np
import pytest
from jax.stages import Lowered

from lsjax.config import Sampling
from lsjax.decoding import runtime
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.compiler import Programs
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import decode
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import Runtime
from lsjax.decoding.strategy import Autoregressive
from tests.states import new_state


@pytest.fixture
def said():
    return []


@pytest.fixture
def compiling(said):
    @contextmanager
    def compiling(line):
        said.append(line)
        yield
        said.append("done")

    return compiling


@pytest.mark.parametrize("rows, names", [(1, "rounds of {}, prompts"), (2, "rounds of {}, new")])
def test_the_first_text_says_what_it_compiles(model, tokenizer, said, compiling, rows, names):
    """All its programs at once, before its first token; the second text needs none."""
    engine = Engine(model, tokenizer, Autoregressive(), batch_size=rows, compiling=compiling)
    for _ in range(2):
        engine.generate(["ab"] * rows, max_new_tokens=4)
    count = 1 + rows
    assert len(said) == 2 and said[1] == "done"
    assert said[0].startswith(f"compiling {count} programs, once for this machine: ")
    assert names.format("autoregressive") in said[0] and len(engine.programs) == count


def test_programs_are_compiled_side_by_side(shallow, tokenizer, monkeypatch):
    """Each waits for the other one to begin."""
    both, compile_ = Barrier(2, timeout=60), Lowered.compile

    def waiting(lowered):
        both.wait()
        return compile_(lowered)

    monkeypatch.setattr(Lowered, "compile", waiting)
    engine = Engine(shallow, tokenizer, Autoregressive())
    engine.generate(["ab"], max_new_tokens=2)
    assert len(engine.programs) == 2


def test_what_differs_between_programs_is_named_in_a_fixed_order():
    """A set's order changes from process to process."""
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)
    kind = runtime.kind_of([Request(prompt="a", sampling=sampling)])
    assert kind.endswith(" ['min_p', 'top_k', 'top_p']")
    assert kind != runtime.kind_of([Request(prompt="a", sampling=Sampling(temperature=1.0))])


@pytest.mark.long
def test_rounds_are_timed_by_the_program_that_decodes(shallow, tokenizer, monkeypatch, tmp_path):
    """So that no program is compiled only to be timed: sampled texts have their own seconds. The
    others begin a text, and pause."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path))
    strategy = Adaptive((1,), lengths=(0, 2))
    engine, programs = Engine(shallow, tokenizer, strategy), []
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.5, seed=3)):
        options = dict(max_new_tokens=4, sampling=sampling, stop_ids=(1, 2, 3, 4, 5))
        engine.generate([Request(prompt="ab", **options)])
        programs.append(len(engine.programs))
    assert programs == [3, 6, 6]
    assert len(list((tmp_path / "round_seconds").iterdir())) == 2


def test_a_program_is_one_on_disk_whatever_holds_its_arguments(shallow):
    """Arrays that were placed on a device, and those that were not, are lowered to one program."""
    request, rounds = Request(prompt=[1, 2], max_new_tokens=2), np.int32(1)
    options = dict(capacity=64, num_layers=2, dtype="float32")
    state = new_state(shallow.config, [request], **options)
    programs, loop = Programs(shallow), partial(decode, strategy=Autoregressive())
    placed = jax.device_put(state, jax.devices()[0])
    texts = {programs.lower(loop, one, rounds, ()).as_text() for one in (state, placed)}
    assert len(texts) == 1


def test_shapes_of_a_cache(shallow):
    own = Runtime(shallow)
    shapes, cache = (make(2, 320, 1) for make in (own.cache_shapes, own.new_cache))
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (shapes, cache))
    assert found[0] == found[1] and jax.tree.leaves(shapes)
