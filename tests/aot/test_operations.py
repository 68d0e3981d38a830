"""Bytes that operations move, and their FLOPs, on small programs written by hand."""

import pytest

from lsjax.aot.hlo import attention_kernel, moved_bytes, operation_flops, parse

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
        # A copy ahead of time counts where it is used, and only what comes from memory.
        ("begun", 0),
        ("fetched", 0),
        ("joined", 0),
        ("uses", 3 * WHOLE),
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


FMHA = """backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, \
"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "8", "8"], \
"tuple_shapes": []}, "mask_type": "CAUSAL"}}"""
PRODUCTS = f"""\
HloModule jit_f

%product (a.1: bf16[5,16], b.1: bf16[16,32]) -> bf16[5,32] {{
  %a.1 = bf16[5,16]{{1,0}} parameter(0)
  %b.1 = bf16[16,32]{{1,0}} parameter(1)
  %dot.1 = f32[5,32]{{1,0}} dot(%a.1, %b.1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out.1 = bf16[5,32]{{1,0}} convert(%dot.1)
}}

ENTRY %main (a: bf16[5,16], b: bf16[16,32], q: bf16[2,8,4,16]) -> bf16[5,32] {{
  %a = bf16[5,16]{{1,0}} parameter(0)
  %b = bf16[16,32]{{1,0}} parameter(1)
  %q = bf16[2,8,4,16]{{3,2,1,0}} parameter(2)
  %split = f32[2,5,32]{{2,1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %gemm = (bf16[5,32]{{1,0}}, s8[1024]{{0}}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={{"gemm_backend_config":\
{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}}}}}}
  %fwd = (bf16[2,4,8,16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", {FMHA}
  %bwd = (bf16[2,4,8,16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", {FMHA}
  %flash = bf16[2,8,4,16]{{3,2,1,0}} custom-call(%q, %q, %q), \
custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(f)/flash_dkv/pallas_call"}}
  %other = bf16[5,16]{{1,0}} negate(%a)
  ROOT %fused = bf16[5,32]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%product
}}
"""


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fused", 2 * 5 * 32 * 16),
        ("split", 2 * 2 * 5 * 32 * 16),
        ("gemm", 2 * 5 * 32 * 16),
        # Scores [2, 4, 8, 8], of which half; two products of heads of 16, five backward.
        ("fwd", 2 * (2 * 2 * 4 * 8 * 8 * 16) / 2),
        ("bwd", 5 * (2 * 2 * 4 * 8 * 8 * 16) / 2),
        ("flash", 4 * (2 * 2 * 4 * 8 * 8 * 16) / 2),
        ("other", 0),
    ],
)
def test_flops_of_operations(name, expected):
    assert operation_flops(parse(PRODUCTS)[-1].instructions[name]) == expected


def test_flops_of_splash():
    """Half of the scores and half of the sums, for a shard of 64 queries of a row."""
    text = """\
ENTRY %main (n: s32[], q: bf16[2,4,64,32], k: bf16[2,2,256,32]) -> f32[8] {
  %n = s32[] parameter(0)
  %q = bf16[2,4,64,32]{3,2,1,0} parameter(1)
  %k = bf16[2,2,256,32]{3,2,1,0} parameter(2)
  ROOT %NAME.7 = f32[8]{0} custom-call(%n, %q, %k, %k), custom_call_target="tpu_custom_call"
}
"""
    forward, backward, other = (
        operation_flops(parse(text.replace("NAME", name))[-1].root)
        for name in ("splash_mha_fwd_residuals", "splash_mha_dkv_x", "other")
    )
    assert forward == 2 * (2 * 64 * 256 * 32) * 2 * 4 / 2
    assert (backward, other) == (2 * forward, 0)


@pytest.mark.parametrize(
    "line, kernel",
    [
        ('custom-call(), custom_call_target="__cudnn$fmhaSoftmaxBackward"', "cudnn"),
        (
            'custom-call(), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(f)/flash_forward/pallas_call"}',
            "flash",
        ),
        ('custom-call(), custom_call_target="tpu_custom_call"', "splash"),
        ('custom-call(), custom_call_target="__cublas$gemm"', "xla"),
    ],
)
def test_the_attention_is_read_from_the_program(line, kernel):
    program = parse(f"ENTRY %main () -> f32[] {{\n  ROOT %splash_mha_fwd.1 = f32[] {line}\n}}\n")
    assert attention_kernel([program[-1].root.kernel]) == kernel
