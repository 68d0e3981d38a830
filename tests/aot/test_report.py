"""A round of decoding in a program written by hand."""

import jax
import pytest

from lsjax.aot.chips import CHIPS
from lsjax.aot.costs import CostAnalysis
from lsjax.aot.hlo import parse
from lsjax.aot.programs import DRAFT_HEAD, DecodingShape, cost_figures, round_reads
from lsjax.config import LlamaConfig, MeshConfig
from lsjax.decoding.programs import ROUNDS
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
def each():
    return CostAnalysis(parse(TEXT), {"tensor": 1}, TRIPS, H100).loop(ROUNDS)


def test_a_round(each):
    """A sum of two reads 8,000 bytes and writes 4,000; a copy moves 8,000. The head runs in three
    of four drafts."""
    assert each.amounts["moved_bytes"] == 12_000 * (1 + 3 + 0.75) + 8_000
    assert each.amounts["compute_seconds"] == pytest.approx(
        each.amounts["moved_bytes"] / H100.hbm_bandwidth
    )
    assert each.amounts["operations"] == 1 + 3 + 0.75 + 1


def test_what_a_round_has_to_read():
    """Layers 0 of 4 draft three times and once more; the head runs three times and once."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    layer, head = SMALL.layer_params * 2, SMALL.head_params * 2
    slots = 2 * 100 * 7 * SMALL.num_kv_heads * SMALL.head_dim * 2  # keys and values of 7 rows
    asked = DecodingShape(batch_size=7, prompt_tokens=100, strategy="autoregressive")
    weights, cache = round_reads(SMALL, asked, mesh)
    assert weights == pytest.approx(4 * layer + head)
    assert cache == 4 * slots
    asked = DecodingShape(batch_size=7, prompt_tokens=100, exit_layer=1, num_draft_tokens=3)
    weights, cache = round_reads(SMALL, asked, mesh)
    assert weights == pytest.approx((4 * 1 + 3) * layer + 4 * head)
    assert cache == 7 * slots


def test_a_report_of_a_round(each):
    found = cost_figures(each, H100)
    assert found["seconds"] == found["compute_seconds"] == each.amounts["compute_seconds"]
    assert found["operations"] == 5.75
