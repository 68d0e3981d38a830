"""OLMo-2 1B, continual pretraining on 52B tokens: the paper's recipe for Llama-3 (section 5.1).

    python train.py --config configs/continual_olmo2_1b.py --workdir runs/continual_olmo2_1b \
        --init-from models/olmo2-1b --data.paths 'corpus/*.txt' --data.tokenizer models/olmo2-1b

Rate, weights and curriculum are the paper's. Learning rate, batch, context, steps and schedule are
ours, near its run of Llama-2 7B. The paper does not train this model, so it gives no result to
expect. The head costs as much as 3.1 layers here. `--early-exit.token-share 0.25` quarters the cost
of the exits' losses, with the same expectation.
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
        vocab_size=100_352,
        hidden_size=2_048,
        intermediate_size=8_192,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        max_context=4_096,
        rope_theta=5e5,
        norm_eps=1e-6,
        qk_norm="full",
        norm_after=True,
    ),
    init_from="models/olmo2-1b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/olmo2-1b"),
    num_steps=50_000,
    batch_size=256,
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.1),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=8),  # 32 devices, as in v5p:2x4x4
    checkpoints=CheckpointConfig(every=1_000),
)
