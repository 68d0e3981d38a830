"""FLOPs of a step, counted by hand."""

from lsjax.config import ExitBlocksConfig, LlamaConfig, LoraConfig
from lsjax.training.profiling import peak_flops, step_flops


def test_a_step_of_a_small_model():
    config = LlamaConfig.tiny(num_layers=2, tie_embeddings=True)  # D 64, F 128, N 4, K 2, H 16
    q, kv, out = 64 * 64, 2 * 64 * 32, 64 * 64
    norms = 2 * 64
    layer = q + kv + out + 3 * 64 * 128 + norms
    weights = 2 * layer + 258 * 64
    # A query sees half of T = 10 keys on average: 2 FLOPs for the score, 2 for the sum, N H wide.
    attention = 2 * (4 * 16) * (10 / 2) * (2 + 2)
    forward = 3 * 10 * (2 * weights + attention)  # 3 rows of 10 tokens
    assert step_flops(config, 3, 10) == 3 * forward


def test_an_untied_head_costs_the_same():
    tied, untied = (LlamaConfig.tiny(tie_embeddings=tie) for tie in (True, False))
    assert step_flops(tied, 2, 8) == step_flops(untied, 2, 8)


def test_frozen_matrices_have_no_gradient():
    config = LlamaConfig.tiny(num_layers=2, tie_embeddings=True)
    tokens = 3 * 10
    whole = step_flops(config, 3, 10)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 2 * layer + 258 * 64
    assert step_flops(config, 3, 10, LoraConfig(rank=0)) == whole
    qkv = 5 * (64 + 64 + 2 * 32)  # rank, inputs and outputs
    gate_up = 5 * (64 + 2 * 128)
    found = step_flops(config, 3, 10, LoraConfig(rank=5, targets=("qkv", "gate_up")))
    assert found == whole - 2 * weights * tokens + 3 * 2 * 2 * (qkv + gate_up) * tokens
    out, down = 5 * (64 + 64), 5 * (128 + 64)
    found = step_flops(config, 3, 10, LoraConfig(rank=5))
    added = qkv + out + gate_up + down
    assert found == whole - 2 * weights * tokens + 3 * 2 * 2 * added * tokens


def test_exit_blocks_spare_the_model_a_backward_pass():
    config = LlamaConfig.tiny(num_layers=3, tie_embeddings=True)  # D 64, F 128, V 258
    tokens, attention = 2 * 10, 2 * (4 * 16) * (10 / 2) * (2 + 2) / 2
    layer = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + attention
    head = 2 * 258 * 64
    one, two = ExitBlocksConfig(exits=(1,)), ExitBlocksConfig(exits=(1, 2))
    forward = 3 * layer + head
    assert step_flops(config, 2, 10, None, one) == tokens * (forward + 3 * layer + 2 * head)
    assert step_flops(config, 2, 10, None, two) == tokens * (forward + 6 * layer + 4 * head)
    kept = ExitBlocksConfig(exits=(1,), keep_states=True, draft_vocab=16, feed_forward=False)
    attention_only = 3 * (layer - 2 * 3 * 64 * 128)
    assert step_flops(config, 2, 10, None, kept) == tokens * (attention_only + 2 * 2 * 16 * 64)


def test_peaks_of_accelerators():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None
