"""Qwen3-0.6B, continual pretraining on 52B tokens: the paper's recipe for Llama-3 (section 5.1).

    python train.py --config configs/continual_qwen3_0_6b.py --workdir runs/continual_qwen3_0_6b \
        --init-from models/qwen3-0.6b --data.paths 'corpus/*.txt' --data.tokenizer models/qwen3-0.6b

Rate, weights and curriculum are the paper's. Learning rate, batch, context, steps and schedule are
ours, near its run of Llama-2 7B. The paper does not train this model, so it gives no result to
expect. The head costs as much as 9.9 of the 28 layers, so intermediate exits learn from a quarter
of all tokens.
"""

from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    model=LlamaConfig(
        vocab_size=151_936,
        hidden_size=1_024,
        intermediate_size=3_072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_context=40_960,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=True,
        qk_norm="head",
    ),
    init_from="models/qwen3-0.6b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/qwen3-0.6b"),
    num_steps=50_000,
    batch_size=256,
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.1, token_share=0.25),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
    remat="attention_output",  # faster than keeping products, by the compiler's estimate
    mesh=MeshConfig(data=-1, fsdp=8),  # 64 devices, as in v5e:8x8
    checkpoints=CheckpointConfig(every=1_000),
)
