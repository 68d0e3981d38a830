"""A round of decoding in a program written by hand."""

import re

import jax
import pytest

from lsjax.aot.chips import CHIPS
from lsjax.aot.costs import CostAnalysis
from lsjax.aot.decoding import (
    DRAFT_HEAD,
    Round,
    chosen_strategy,
    decode_program,
    kinds_of_rounds,
    round_reads,
    round_trips,
)
from lsjax.aot.hlo import parse
from lsjax.aot.programs import cost_figures
from lsjax.config import ConfigError, DecodingShape, LlamaConfig, MeshConfig
from lsjax.decoding.scopes import ROUNDS
from lsjax.sharding import make_mesh

H100 = next(chip for chip in CHIPS if chip.name == "h100")
# A weight is copied once per call. A round has a kernel, a loop of 3 trips, the conditional around
# the draft's head, and a copy.
TEXT = """\
HloModule jit_run

%add (a: f32[1000], b: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[1000]{0} parameter(1)
  ROOT %c = f32[1000]{0} add(%a, %b)
}

%more (q: f32[1000]) -> pred[] {
  %q = f32[1000]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

%block (r: f32[1000]) -> f32[1000] {
  %r = f32[1000]{0} parameter(0)
  ROOT %s = f32[1000]{0} fusion(%r, %r), kind=kLoop, calls=%add
}

%head (t: f32[1000]) -> f32[1000] {
  %t = f32[1000]{0} parameter(0)
  ROOT %u = f32[1000]{0} fusion(%t, %t), kind=kLoop, calls=%add
}

%none (v: f32[1000]) -> f32[1000] {
  ROOT %v = f32[1000]{0} parameter(0)
}

%round (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %zero = s32[] constant(0)
  %y = f32[1000]{0} fusion(%x, %x), kind=kLoop, calls=%add
  %z = f32[1000]{0} while(%y), condition=%more, body=%block, \
backend_config={"known_trip_count":{"n":"3"}}, metadata={op_name="a/while"}
  %w = f32[1000]{0} conditional(%zero, %z, %z), branch_computations={%none, %head}, \
metadata={op_name="jit(run)/rounds/while/body/draft/while/body/cond"}
  ROOT %end = f32[1000]{0} copy(%w)
}

ENTRY %main (in: f32[1000]) -> f32[1000] {
  %in = f32[1000]{0} parameter(0)
  %laid = f32[1000]{0} copy(%in)
  ROOT %out = f32[1000]{0} while(%laid), condition=%more, body=%round, \
metadata={op_name="jit(run)/rounds/while"}
}
"""
TRIPS = {f"/{ROUNDS}/while$": 1, DRAFT_HEAD: 0.75}
SMALL = LlamaConfig.tiny()


@pytest.fixture(scope="module")
def analysis():
    return CostAnalysis(parse(TEXT), {"tensor": 1}, TRIPS, H100)


@pytest.fixture(scope="module")
def each(analysis):
    return analysis.loop(ROUNDS)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_a_round(each):
    """A sum of two reads 8,000 bytes and writes 4,000; a copy moves 8,000. The head runs in three
    of four drafts."""
    assert each.amounts["moved_bytes"] == 12_000 * (1 + 3 + 0.75) + 8_000
    assert each.amounts["serial_seconds"] == pytest.approx(
        each.amounts["moved_bytes"] / H100.hbm_bandwidth
    )
    assert each.amounts["operations"] == 1 + 3 + 0.75 + 1


def test_what_happens_once_per_call(analysis):
    """The copy of the weight, without any round."""
    around = analysis.around(ROUNDS)
    assert around.amounts["moved_bytes"] == 8_000
    assert around.amounts["operations"] == 1


def test_what_a_round_has_to_read(mesh):
    """Layers 0 of 4 draft three times and once more; the head runs three times and once."""
    layer, head = SMALL.layer_params * 2, SMALL.head_params * 2
    slots = 2 * 100 * 7 * SMALL.num_kv_heads * SMALL.head_dim * 2  # keys and values of 7 rows
    asked = DecodingShape(prompt_tokens=100)
    weights, cache = round_reads(SMALL, asked, 7, Round(0, 0), mesh)
    assert weights == pytest.approx(4 * layer + head)
    assert cache == 4 * slots
    weights, cache = round_reads(SMALL, asked, 7, Round(1, 3), mesh)
    assert weights == pytest.approx((4 * 1 + 3) * layer + 4 * head)
    assert cache == 7 * slots


def test_kinds_of_rounds():
    """`auto` has a round without drafts and one that drafts."""
    model = LlamaConfig.tiny(num_layers=32)
    without, drafting = Round(0, 0), Round(8, 4)
    assert kinds_of_rounds(DecodingShape(strategy="autoregressive"), model) == [without]
    assert kinds_of_rounds(DecodingShape(), model) == [drafting]
    assert kinds_of_rounds(DecodingShape(strategy="auto"), model) == [without, drafting]
    wrong = DecodingShape(strategy="auto", num_draft_tokens=16)
    with pytest.raises(ConfigError, match=r"num-draft-tokens 16 must be in 1\.\.15 for auto"):
        chosen_strategy(wrong, model)


# The loops of `auto`, with exits 1 and 2 of 4 layers, that run in a round of each kind.
TAKEN = {
    Round(0, 0): {
        "verify/up_to_0_drafts": 1,
        "verify/up_to_0_drafts/while/body/layers_0_to_0": 1,
        "verify/up_to_0_drafts/while/body/layers_1_to_1": 1,
    },
    Round(1, 4): {
        "draft": 5,
        "verify/up_to_6_drafts": 1,
        "verify/up_to_6_drafts/while/body/layers_1_to_1": 1,
    },
    Round(2, 1): {
        "draft": 2,
        "draft/while/body/layers_1_to_1": 1,
        "verify/up_to_2_drafts": 1,
    },
}


def test_branches_of_auto(mesh):
    """A round runs the draft, one of four verifications, and the layers that did not draft."""
    asked = DecodingShape(strategy="auto", prompt_tokens=64)
    program = decode_program(SMALL, asked, 1, mesh).as_text(debug_info=True)
    body = "jit(run)/rounds/while/body/"
    loops = re.findall(rf'"{re.escape(body)}([^"]*)/while"', program)
    loops = {loop for loop in loops if "cache_blocks" not in loop}
    assert sum(loop.startswith("verify/") and "/body" not in loop for loop in loops) == 4
    for kind, taken in TAKEN.items():
        trips = round_trips(SMALL, asked, kind)
        found = {}
        for loop in sorted(loops):  # outer ones first
            name = f"{body}{loop}/while"
            outer = loop.rpartition("/while/body/")[0]
            times = next(times for one, times in trips.items() if re.search(one, name))
            if times and (not outer or outer in found):
                found[loop] = times
        assert found == taken


def test_a_report_of_a_round(each):
    """All its time is that of the memory."""
    found = cost_figures(each, H100)
    times = ("memory_seconds", "serial_seconds", "seconds")
    assert {found[name] for name in times} == {each.amounts["moved_bytes"] / H100.hbm_bandwidth}
    assert found["core_seconds"] == found["sent_seconds"] == 0
    assert found["operations"] == 5.75


def test_the_longer_of_memory_and_core():
    """Two operations: one takes 3 s of cycles and 1 s of bytes, the other 1 s and 2 s. Together the
    core is busy for 4 s and the memory for 3 s. One after the other takes 5 s."""
    chip = CHIPS[0]
    second, bandwidth = round(chip.clock), round(chip.hbm_bandwidth)
    text = f"""\
ENTRY %main (x: s8[1], y: s8[1]) -> s8[] {{
  %x = s8[{bandwidth}]{{0}} parameter(0)
  %y = s8[{2 * bandwidth}]{{0}} parameter(1)
  %z = s8[8]{{0:S(1)}} negate(%x), backend_config={{"estimated_cycles":"{3 * second}"}}
  ROOT %w = s8[8]{{0:S(1)}} negate(%y), backend_config={{"estimated_cycles":"{second}"}}
}}
"""
    found = cost_figures(CostAnalysis(parse(text), {"tensor": 1}, {}, chip).program(), chip)
    assert found["memory_seconds"] == pytest.approx(3)
    assert found["core_seconds"] == found["seconds"] == pytest.approx(4)
    assert found["serial_seconds"] == pytest.approx(5)
