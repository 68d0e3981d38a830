"""Shapes as compiled programs write them."""

import pytest

from lsjax.aot.shapes import arrays, bare, shape_bytes, started


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
    assert shape_bytes(shape) == expected


def test_fast_memory_is_told_apart():
    found = arrays("(bf16[4]{0:T(128)(2,1)S(1)}, /*index=1*/bf16[4]{0:T(128)(2,1)})")
    assert [array.in_memory for array in found] == [False, True]


def test_layouts_are_left_out():
    assert bare("(f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)})") == "f32[8,128], s32[]"


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("(f32[4,128]{1,0}, f32[8,128]{1,0})", " f32[8,128]{1,0}"),
        ("((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0}), u32[])", " (f32[8]{0}, f32[4]{0})"),
        ("f32[8]{0}", "f32[8]{0}"),
    ],
)
def test_results_of_asynchronous_starts(shape, expected):
    assert started(shape) == expected
