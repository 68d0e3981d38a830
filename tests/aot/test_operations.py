"""FLOPs of operations, and attention kernels, on small programs written by hand."""

import pytest

from lsjax.aot.hlo import attention_kernel, operation_flops, parse

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
