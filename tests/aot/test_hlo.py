"""Reading compiled programs, on small ones written by hand, and what they cost."""

import numpy as np
import pytest

from lsjax.aot.chips import CHIPS
from lsjax.aot.costs import CostAnalysis, ProgramCosts, Trips, device_groups, trip_count
from lsjax.aot.hlo import arrays, parse

MESH = dict(data=2, fsdp=4, tensor=1)
# A loop of 6 trips around a loop of unknown length, as the TPU compiler writes them: counters and
# limits that are not known travel in the tuple, layouts have brackets, long tuples have comments.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0})->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%all-reduce-scatter.1 (x: bf16[64,128]) -> bf16[16,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %sum.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%add
  ROOT %part = bf16[16,128]{1,0} dynamic-slice(%sum.1), dynamic_slice_sizes={16,128}
}

%step.1 (x.5: f32[8,128]) -> f32[32,128] {
  %x.5 = f32[8,128]{1,0} parameter(0)
  ROOT %piece.1 = f32[32,128]{1,0} all-gather(%x.5), channel_id=7, replica_groups=[2,4]<=[8], \
dimensions={0}, metadata={op_name="jit(step)/while/body/dot_general"}
}

%step.2 (x.6: f32[8,128]) -> f32[32,128] {
  %x.6 = f32[8,128]{1,0} parameter(0)
  ROOT %piece.2 = f32[32,128]{1,0} all-gather(%x.6), channel_id=7, replica_groups=[2,4]<=[8], \
dimensions={0}, metadata={op_name="jit(step)/while/body/dot_general"}
}

%inner_cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%inner (p.1: (s32[], s32[])) -> (s32[], s32[]) {
  %p.1 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %work = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%add, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %t.1 = (s32[], s32[]) tuple(%p.1)
}

%cond (q: (s32[], f32[8,128], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/s32[]) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(6)
  %copied = s32[]{:T(128)S(6)} copy(%limit)
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %copied), direction=LT
}

%body (r: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %r = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/s32[]) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%r), index=0
  %one = s32[]{:T(128)} constant(1)
  %copy = s32[]{:T(128)S(6)} copy(%k)
  %next = s32[]{:T(128)} add(%copy, %one)
  %x.1 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%r), index=1
  %begun.1 = f32[32,128]{1,0:T(8,128)} fusion(%x.1), kind=kCustom, calls=%step.1
  %gathered = f32[32,128]{1,0:T(8,128)} fusion(%x.1), kind=kCustom, calls=%step.2
  %scattered = bf16[16,128]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %bound = s32[] get-tuple-element(%r), index=2
  %start = (s32[], s32[]) tuple(%one, %k)
  %chunks = (s32[], s32[]) while(%start), condition=%inner_cond, body=%inner, \
metadata={op_name="jit(step)/while/body/chunks/while"}
  ROOT %t = (s32[], f32[8,128], s32[]) tuple(%next, %x.1, %bound)
}

%cheap (x.2: f32[8]) -> f32[8] {
  ROOT %x.2 = f32[8]{0} parameter(0)
}

%dear (x.3: f32[8]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} fusion(%x.3), kind=kLoop, calls=%add, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
}

ENTRY %main.9_spmd (x.4: f32[8,128]) -> f32[8,128] {
  %x.4 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %twelve = s32[]{:T(128)} constant(12)
  %t.2 = (s32[], f32[8,128], s32[]) tuple(%zero, %x.4, %twelve)
  %loop = (s32[], f32[8,128], s32[]) while(%t.2), condition=%cond, body=%body, \
metadata={op_name="jit(step)/while"}
  %q8 = bf16[2,4,64,32]{3,2,1,0} bitcast(%x.4)
  %splash_mha_fwd_residuals.7 = (f32[8]{0}, bf16[2,4,64,32]{3,2,1,0}) custom-call(%q8, %q8), \
custom_call_target="tpu_custom_call"
  %begun = (f32[4,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%x.4), \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %ended = f32[8,128]{1,0} all-gather-done(%begun)
  ROOT %either = f32[8,128]{1,0} conditional(%zero, %x.4, %x.4), \
branch_computations={%cheap, %dear}
}
"""


def costs_of(text: str, trips: Trips) -> ProgramCosts:
    return CostAnalysis(parse(text), MESH, trips, CHIPS[0]).program()


@pytest.fixture(scope="module")
def costs():
    return costs_of(TEXT, {"/chunks/while$": 5})


def test_trip_counts_are_read_from_limits():
    """The inner loop's limit is known when it runs only."""
    program = parse(TEXT)
    assert program[-1].name == "main.9_spmd"
    assert trip_count(program[-1].instructions["loop"]) == 6
    body = next(part for part in program if part.name == "body")
    assert trip_count(body.instructions["chunks"]) is None


def test_trips_that_add_more_than_one_are_fewer():
    """XLA:TPU's loops of matmuls overlap two steps with their communication in each trip."""
    text = TEXT.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(4)")
    assert trip_count(parse(text)[-1].instructions["loop"]) == 2


def test_a_peeled_loop_begins_at_one():
    text = TEXT.replace("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(1)")
    assert trip_count(parse(text)[-1].instructions["loop"]) == 5


def test_a_known_trip_count_holds():
    known = 'backend_config={"known_trip_count":{"n":"3"}}'
    text = TEXT.replace('metadata={op_name="jit(step)/while"}', known)
    assert trip_count(parse(text)[-1].instructions["loop"]) == 3


def test_cycles_are_counted_as_often_as_they_run(costs):
    """The dearer branch once; a fusion has its own estimate and not that of what it calls."""
    assert costs.amounts["cycles"] == 6 * (100 + 5 * 10) + 1000
    assert not costs.unknown_loops


def test_a_loop_of_unknown_length_counts_once():
    costs = costs_of(TEXT, {})
    assert costs.amounts["cycles"] == 6 * (100 + 10) + 1000
    assert [*costs.unknown_loops] == ["jit(step)/while/body/chunks/while"]


def test_collectives_by_kind_axes_and_bytes(costs):
    found = {one.kind + " " + one.shape: (one, count) for one, count in costs.collectives.items()}
    assert len(found) == 3
    # In two parts, beside two other computations.
    gather, times = found["all-gather f32[32,128]"]
    assert (gather.axes, times, gather.bytes) == (("fsdp",), 6, 32 * 128 * 4)
    assert gather.sent == gather.bytes * 3 // 4 and gather.op_name.endswith("dot_general")
    # An all-reduce in a fusion that keeps a part of it.
    scatter, times = found["reduce-scatter bf16[64,128]"]
    assert (scatter.axes, times, scatter.bytes) == (("fsdp",), 6, 64 * 128 * 2)
    assert scatter.sent == scatter.bytes * 3 // 4
    # Devices 0 and 4 and so on, which the text names by a mesh of its own.
    begun, times = found["all-gather f32[8,128]"]
    assert (begun.axes, times, begun.sent) == (("data",), 1, 8 * 128 * 4 // 2)


@pytest.mark.parametrize(
    "transfer, kind, size, sent",
    [
        ("ALL_REDUCE", "all-reduce", 4096, 4096 * 2 * 3 // 4),
        ("ALL_GATHER", "all-gather", 4 * 4096, 4 * 4096 * 3 // 4),
        ("ALL_TO_ALL", "all-to-all", 4096, 4096 * 3 // 4),
        ("ONE_TO_ONE", "collective-permute", 4096, 4096),
    ],
)
def test_what_slices_send_to_each_other(transfer, kind, size, sent):
    """The TPU compiler writes a send to the host. It moves nothing else, and a send without the
    attribute is no collective."""
    attributes = f'frontend_attributes={{_xla_megascale_transfer_type="{transfer}"}}'
    text = f"""\
ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %after = token[] after-all()
  %other = (f32[8,128]{{1,0}}, u32[], token[]) send(%x, %after), channel_id=1
  %sent = (f32[8,128]{{1,0}}, u32[], token[]) send(%x, %after), channel_id=2, {attributes}
  ROOT %sum = f32[8,128]{{1,0}} all-reduce(%x), replica_groups={{{{0,1}},{{2,3}}}}
}}
"""
    mesh = dict(slices=4, data=2, fsdp=2)
    costs = CostAnalysis(parse(text), mesh, {}, CHIPS[0]).program()
    within, between = sorted(costs.collectives, key=lambda one: one.axes)
    assert (within.axes, costs.sent_bytes(between=False)) == (("fsdp",), 4096)
    assert (between.axes, between.kind, between.bytes) == (("slices",), kind, size)
    assert costs.sent_bytes(between=True) == between.sent == sent
    assert costs.amounts["moved_bytes"] == costs.amounts["operations"] == 0


def test_groups_within_and_between_slices():
    """Other compilers number the devices of all slices: 0 to 3 are the first of two."""
    text = """\
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %within = f32[8,128]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %between = f32[8,128]{1,0} all-reduce(%within), replica_groups={{0,4},{1,5},{2,6},{3,7}}
}
"""
    costs = CostAnalysis(parse(text), dict(slices=2, data=2, fsdp=2), {}, CHIPS[0]).program()
    assert [one.axes for one in costs.collectives] == [("data", "fsdp"), ("slices",)]
    assert costs.sent_bytes(between=False) == 2 * 3 / 4 * 8 * 128 * 4
    assert costs.sent_bytes(between=True) == 2 * 1 / 2 * 8 * 128 * 4


def test_kernels_are_listed(costs):
    assert costs.kernels == {"splash_mha_fwd_residuals": 1}


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("replica_groups={{0,2},{1,3}}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'c'=2] {'a','c'}, x", [[0, 1, 2, 3]]),
        ("replica_groups={}, x={{9}}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_ways_to_write_groups(attributes, expected):
    np.testing.assert_array_equal(device_groups(attributes, 4), expected)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("f32[2,3]{1,0:T(8,128)S(1)}", 24),
        ("(bf16[4], pred[8], s32[])", 8 + 8 + 4),
        ("f8e4m3fn[10]", 10),
        ("s4[10]", 5),
        ("c64[2]", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert sum(array.bytes for array in arrays(shape)) == expected


def test_fast_memory_is_told_apart():
    found = arrays("(bf16[4]{0:T(128)(2,1)S(1)}, /*index=1*/bf16[4]{0:T(128)(2,1)})")
    assert [array.in_memory for array in found] == [False, True]


def test_layouts_are_left_out():
    found = arrays("(f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)})")
    assert [str(array) for array in found] == ["f32[8,128]", "s32[]"]


def test_results_of_asynchronous_starts():
    """The shape that is exchanged is that of the result, wherever the start has it."""
    text = """\
ENTRY %main (a: f32[4], b: f32[2]) -> (f32[8], f32[4]) {
  %a = f32[4]{0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %begun = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0}), u32[]) all-gather-start(%a, %b), \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %ended = (f32[8]{0}, f32[4]{0}) all-gather-done(%begun)
}
"""
    ((one, times),) = costs_of(text, {}).collectives.items()
    assert (one.shape, one.sent, times) == ("f32[8], f32[4]", 24, 1)
