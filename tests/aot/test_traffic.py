"""Bytes that operations move, on small programs written by hand."""

import pytest

from lsjax.aot.chips import CHIPS
from lsjax.aot.costs import CostAnalysis
from lsjax.aot.hlo import parse
from lsjax.aot.traffic import moved_bytes
from scripts.proofs.traffic import megabytes

TEXT = """\
HloModule jit_step

%all (p.1: bf16[8,4], q.1: bf16[8,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %q.1 = bf16[8,4]{1,0} parameter(1)
  ROOT %sum.1 = bf16[8,4]{1,0} add(%p.1, %q.1)
}

%slices (p.2: bf16[8,4], i.2: s32[]) -> f32[2,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %view.2 = bf16[8,1,4]{2,1,0} bitcast(%p.2)
  %wide.2 = f32[8,1,4]{2,1,0} convert(%view.2)
  %part.2 = f32[2,1,4]{2,1,0} dynamic-slice(%wide.2, %i.2, %i.2, %i.2), \
dynamic_slice_sizes={2,1,4}
  ROOT %out.2 = f32[2,4]{1,0} bitcast(%part.2)
}

%updates (p.3: bf16[8,4], u.3: f32[1,4], i.3: s32[]) -> (bf16[8,4], f32[1,4]) {
  %p.3 = bf16[8,4]{1,0} parameter(0)
  %u.3 = f32[1,4]{1,0} parameter(1)
  %i.3 = s32[] parameter(2)
  %new.3 = bf16[1,4]{1,0} convert(%u.3)
  %put.3 = bf16[8,4]{1,0} dynamic-update-slice(%p.3, %new.3, %i.3, %i.3)
  %same.3 = f32[1,4]{1,0} negate(%u.3)
  ROOT %out.3 = (bf16[8,4]{1,0}, f32[1,4]{1,0}) tuple(%put.3, %same.3)
}

%update_and_read (p.4: bf16[8,4], u.4: bf16[1,4], i.4: s32[]) -> (bf16[8,4], bf16[8,4]) {
  %p.4 = bf16[8,4]{1,0} parameter(0)
  %u.4 = bf16[1,4]{1,0} parameter(1)
  %i.4 = s32[] parameter(2)
  %put.4 = bf16[8,4]{1,0} dynamic-update-slice(%p.4, %u.4, %i.4, %i.4)
  %read.4 = bf16[8,4]{1,0} negate(%put.4)
  ROOT %out.4 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}) tuple(%put.4, %read.4)
}

%nested (p.5: bf16[8,4], i.5: s32[]) -> f32[2,4] {
  %p.5 = bf16[8,4]{1,0} parameter(0)
  %i.5 = s32[] parameter(1)
  ROOT %inner.5 = f32[2,4]{1,0} fusion(%p.5, %i.5), kind=kLoop, calls=%slices
}

ENTRY %main (x: bf16[8,4], u: f32[1,4], i: s32[]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %u = f32[1,4]{1,0} parameter(1)
  %v = bf16[1,4]{1,0} convert(%u)
  %i = s32[] parameter(2)
  %plain = bf16[8,4]{1,0} fusion(%x, %x), kind=kLoop, calls=%all
  %sliced = f32[2,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%slices
  %nest = f32[2,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%nested
  %put = (bf16[8,4]{1,0}, f32[1,4]{1,0}) fusion(%x, %u, %i), kind=kLoop, calls=%updates
  %both = (bf16[8,4]{1,0}, bf16[8,4]{1,0}) fusion(%x, %v, %i), kind=kLoop, \
calls=%update_and_read
  %copied = bf16[8,4]{0,1} copy(%x)
  %part = bf16[2,4]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={2,4}
  %placed = bf16[8,4]{1,0} dynamic-update-slice(%x, %v, %i, %i)
  %view = bf16[32]{0} bitcast(%x)
  %begun = ((bf16[8,4]{1,0}), bf16[4,4]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:4], [0:4]}
  %fetched = bf16[4,4]{1,0:S(1)} slice-done(%begun)
  %other = bf16[4,4]{1,0:S(1)} negate(%x)
  %joined = bf16[8,4]{1,0:S(1)} custom-call(%fetched, %fetched), \
custom_call_target="ConcatBitcast"
  %uses = bf16[8,4]{1,0} fusion(%joined, %x), kind=kLoop, calls=%all
  %near = bf16[4,4]{1,0:S(1)} negate(%other)
  %gathered = bf16[16,4]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
  ROOT %kernel = bf16[8,4]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
}
"""
WHOLE, INDEX = 8 * 4 * 2, 4


@pytest.mark.parametrize(
    "name, expected",
    [
        ("x", 0),
        ("view", 0),
        ("plain", 3 * WHOLE),
        # 2 of 8 rows are read as bfloat16 and written as float32.
        ("sliced", 2 * 4 * 2 + 2 * 4 * 4 + INDEX),
        ("nest", 2 * 4 * 2 + 2 * 4 * 4 + INDEX),
        # In place: a row is read, and written to both results.
        ("put", 4 * 4 + INDEX + 4 * 2 + 4 * 4),
        # What else reads the updated array reads all of it.
        ("both", WHOLE + 4 * 2 + INDEX + 4 * 2 + WHOLE),
        ("copied", 2 * WHOLE),
        ("part", 2 * (2 * 4 * 2) + 2 * INDEX),
        ("placed", 2 * (4 * 2) + 2 * INDEX),
        # A copy to fast memory counts at its end, not at its start or use.
        ("begun", 0),
        ("fetched", 4 * 4 * 2),
        ("joined", 0),
        ("uses", 2 * WHOLE),
        ("other", WHOLE),
        ("near", 0),
        ("gathered", 0),
        ("kernel", 3 * WHOLE),
    ],
)
def test_bytes_of_operations(name, expected):
    assert moved_bytes(parse(TEXT)[-1].instructions[name]) == expected


def test_results_in_place_of_a_kernel():
    """A kernel that updates a cache reads all of it, and writes its own results."""
    text = """\
HloModule jit_run

ENTRY %main (q: f32[4], c: bf16[8,4]) -> (f32[4], bf16[8,4]) {
  %q = f32[4]{0} parameter(0)
  %c = bf16[8,4]{1,0} parameter(1)
  ROOT %out = (f32[4]{0}, bf16[8,4]{1,0}) custom-call(%q, %c), \
custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{1}: (1, {})}
}
"""
    assert moved_bytes(parse(text)[-1].instructions["out"]) == 16 + 64 + 16


# Copies between both memories, as the TPU compiler writes them: of a cache to fast memory and back,
# of one that stays there, within memory, of a slice, and into a slice.
COPIES = """\
HloModule jit_run

ENTRY %main (c: bf16[8,4], u: bf16[1,4], i: s32[]) -> bf16[8,4] {
  %c = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %u = bf16[1,4]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %begin = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%c)
  %in = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy-done(%begin)
  %put = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} dynamic-update-slice(%in, %u, %i, %i)
  %near = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} negate(%put)
  %leave = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) \
copy-start(%put)
  %out = bf16[8,4]{1,0:T(8,128)(2,1)} copy-done(%leave)
  %again = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%out)
  %same = bf16[8,4]{1,0:T(8,128)(2,1)} copy-done(%again)
  %cut = ((bf16[8,4]{1,0:T(8,128)(2,1)S(1)}), bf16[2,4]{1,0:T(8,128)(2,1)}, s32[]{:S(2)}) \
slice-start(%near), slice={[0:2], [0:4]}
  %part = bf16[2,4]{1,0:T(8,128)(2,1)} slice-done(%cut)
  %place = ((bf16[8,4]{1,0}, bf16[1,4]{1,0:S(1)}, s32[], s32[]), bf16[8,4]{1,0}, u32[]) \
dynamic-update-slice-start(%same, %u, %i, %i)
  ROOT %placed = bf16[8,4]{1,0:T(8,128)(2,1)} dynamic-update-slice-done(%place)
}
"""


@pytest.mark.parametrize(
    "name, expected",
    [
        ("begin", 0),
        ("in", WHOLE),
        # The update in fast memory moves nothing; what is written back counts in full.
        ("put", 0),
        ("near", 0),
        ("leave", 0),
        ("out", WHOLE),
        ("same", 2 * WHOLE),
        ("part", 2 * 4 * 2),
        ("placed", 4 * 2),
    ],
)
def test_copies_count_in_both_directions(name, expected):
    assert moved_bytes(parse(COPIES)[-1].instructions[name]) == expected


@pytest.mark.parametrize(
    "update, expected",
    [
        # A row comes from memory and goes there.
        ("{1,0}", 2 * 4 * 2),
        ("{1,0:S(1)}", 4 * 2),
    ],
)
def test_updates_in_place(update, expected):
    text = f"""\
ENTRY %main (c: bf16[8,4], u: bf16[1,4], i: s32[]) -> bf16[8,4] {{
  %c = bf16[8,4]{{1,0}} parameter(0)
  %u = bf16[1,4]{update} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %put = bf16[8,4]{{1,0}} dynamic-update-slice(%c, %u, %i, %i)
}}
"""
    assert moved_bytes(parse(text)[-1].root) == expected


# A layer of Llama-2 7B decodes a row on one of four TPUs v5e, as compiled by libtpu 0.0.42.1. The
# cache goes to fast memory and back, and gate_up arrives in two parts. Left out are operations
# that only touch fast memory. Fusions are plain products.
LAYER = """\
HloModule jit_run

ENTRY %layer (x: bf16[1,8,4096], key: bf16[1,8,1,128], value: bf16[1,8,1,128], at: s32[], \
norm: bf16[4096], norm.2: bf16[4096], w: bf16[4096,8,3,128], o: bf16[1024,4096], \
gate_up: bf16[4096,2,2752], down: bf16[2752,4096], k: bf16[1,8,2112,128], \
v: bf16[1,8,2112,128]) -> bf16[1,8,4096] {
  %x = bf16[1,8,4096]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %key = bf16[1,8,1,128]{3,2,1,0:T(2,128)(2,1)S(1)} parameter(1)
  %value = bf16[1,8,1,128]{3,2,1,0:T(2,128)(2,1)S(1)} parameter(2)
  %at = s32[]{:T(128)S(6)} parameter(3)
  %norm = bf16[4096]{0:T(1024)(128)(2,1)} parameter(4)
  %norm.2 = bf16[4096]{0:T(1024)(128)(2,1)} parameter(5)
  %w = bf16[4096,8,3,128]{3,0,2,1:T(8,128)(2,1)} parameter(6)
  %o = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(7)
  %gate_up = bf16[4096,2,2752]{0,2,1:T(8,128)(2,1)} parameter(8)
  %down = bf16[2752,4096]{1,0:T(8,128)(2,1)} parameter(9)
  %k = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)} parameter(10)
  %v = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)} parameter(11)
  %scale = f32[4096]{0:T(1024)S(1)} convert(%norm), \
backend_config={"estimated_cycles":"1834"}
  %scale.2 = f32[4096]{0:T(1024)S(1)} convert(%norm.2), \
backend_config={"estimated_cycles":"1834"}
  %begin.v = (bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%v)
  %begin.k = (bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%k)
  %cut.1 = ((bf16[4096,2,2752]{0,2,1:T(8,128)(2,1)}), bf16[4096,1,2752]\
{0,2,1:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%gate_up), \
slice={[0:4096], [0:1], [0:2752]}
  %cut.2 = ((bf16[4096,2,2752]{0,2,1:T(8,128)(2,1)}), bf16[4096,1,2752]\
{0,2,1:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%gate_up), \
slice={[0:4096], [1:2], [0:2752]}
  %qkv = bf16[8,8,3,128]{3,0,2,1:T(8,128)(2,1)S(1)} convolution(%w, %x), \
backend_config={"estimated_cycles":"68627"}
  %near.v = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%begin.v)
  %put.v = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)} \
dynamic-update-slice(%near.v, %value, %at, %at, %at, %at)
  %near.k = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%begin.k)
  %back.v = (bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)}, \
bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%put.v)
  %put.k = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)} \
dynamic-update-slice(%near.k, %key, %at, %at, %at, %at)
  %back.k = (bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)}, \
bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%put.k)
  %scores = f32[8,8,2112]{2,1,0:T(8,128)S(1)} convolution(%put.k, %qkv), \
backend_config={"estimated_cycles":"1344"}
  %mean = bf16[1,8,8,128]{3,2,1,0:T(8,128)(2,1)S(1)} convolution(%put.v, %scores), \
backend_config={"estimated_cycles":"3210"}
  %out = bf16[1,8,4096]{2,1,0:T(8,128)(2,1)S(1)} convolution(%o, %mean), \
backend_config={"estimated_cycles":"24050"}
  %done.v = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)} copy-done(%back.v)
  %done.k = bf16[1,8,2112,128]{3,2,1,0:T(8,128)(2,1)} copy-done(%back.k)
  %summed = bf16[1,8,4096]{2,1,0:T(8,128)(2,1)S(1)} all-reduce(%out), channel_id=17, \
replica_groups={{0,1,2,3}}
  %part.1 = bf16[4096,1,2752]{0,2,1:T(8,128)(2,1)S(1)} slice-done(%cut.1)
  %part.2 = bf16[4096,1,2752]{0,2,1:T(8,128)(2,1)S(1)} slice-done(%cut.2)
  %joined = bf16[4096,2,2752]{0,2,1:T(8,128)(2,1)S(1)} custom-call(%part.1, %part.2), \
custom_call_target="ConcatBitcast"
  %wide = bf16[1,8,2,2752]{3,1,2,0:T(8,128)(2,1)S(1)} convolution(%joined, %summed), \
backend_config={"estimated_cycles":"15199"}
  ROOT %narrow = bf16[1,8,4096]{2,1,0:T(8,128)(2,1)S(1)} convolution(%down, %wide), \
backend_config={"estimated_cycles":"65362"}
}
"""
# Bytes by hand, of bfloat16: 4096 wide, 8 heads of 128, 2752 channels, 2112 slots.
NORM, QKV, OUT = 2 * 4096, 2 * 4096 * 8 * 3 * 128, 2 * 1024 * 4096
GATE_UP, DOWN, SLOTS = 2 * 4096 * 2 * 2752, 2 * 2752 * 4096, 2 * 8 * 2112 * 128


def test_a_layer_by_hand():
    """The keys and the values are read once and written once, all weights are read once.

    Without overlap, most products take their cycles. That of gate_up waits for its two parts, and
    each update of the cache for its copies.
    """
    chip = CHIPS[0]
    costs = CostAnalysis(parse(LAYER), {"tensor": 4}, {}, chip).program().amounts
    assert costs["moved_bytes"] == 2 * NORM + QKV + OUT + GATE_UP + DOWN + 4 * SLOTS
    assert costs["moved_bytes"] == 118_505_472
    assert costs["cycles"] == 2 * 1834 + 68627 + 1344 + 3210 + 24050 + 15199 + 65362
    # Products that wait for memory; the others are bound by their cycles.
    moved = (GATE_UP + 4 * SLOTS) / chip.hbm_bandwidth
    cycles = costs["cycles"] - 15199
    assert costs["serial_seconds"] == pytest.approx(cycles / chip.clock + moved)


@pytest.mark.parametrize("text", [TEXT, LAYER], ids=["operations", "layer"])
def test_a_second_count(text):
    """By code that shares nothing with the first."""
    counted = CostAnalysis(parse(text), {"tensor": 4}, {}, CHIPS[0]).program().amounts
    assert counted["moved_bytes"] == pytest.approx(1e6 * megabytes(text, {}))


def test_a_prefetch_belongs_to_its_first_reader():
    """The second product finds the cache in fast memory. What nothing reads counts by itself."""
    chip = CHIPS[0]
    text = COPIES.replace("negate(%put)", 'negate(%in), backend_config={"estimated_cycles":"9"}')
    amounts = CostAnalysis(parse(text), {"tensor": 1}, {}, chip).program().amounts
    assert amounts["moved_bytes"] == WHOLE + WHOLE + 2 * WHOLE + 16 + 8
    serial = amounts["moved_bytes"] / chip.hbm_bandwidth + 9 / chip.clock
    assert amounts["serial_seconds"] == pytest.approx(serial)
    unread = text[: text.index("  %put")] + "  ROOT %t = (s32[]) tuple(%i)\n}\n"
    amounts = CostAnalysis(parse(unread), {"tensor": 1}, {}, chip).program().amounts
    assert amounts["moved_bytes"] == WHOLE
    assert amounts["serial_seconds"] == pytest.approx(WHOLE / chip.hbm_bandwidth)
