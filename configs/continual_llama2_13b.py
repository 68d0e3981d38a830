"""Llama-2 13B, continual pretraining on 52B tokens (the paper's section 5.1, Tables 8 and 10).

    python train.py --config configs/continual_llama2_13b.py --workdir runs/continual_llama2_13b \
        --init-from models/llama2-13b --data.paths 'corpus/*.txt' --data.tokenizer models/llama2-13b

Rates, weights, curriculum, learning rate, batch, steps and context are the paper's. It does not
give warm-up, decay and the rest of AdamW, so those are ours. Expected from the paper: exit 15 with
12 drafts accepts 75% on CNN/DM and decodes 1.81 times as fast.
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
        vocab_size=32_000,
        hidden_size=5_120,
        intermediate_size=13_824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        max_context=4_096,
    ),
    init_from="models/llama2-13b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama2-13b"),
    num_steps=50_000,
    batch_size=256,  # 64 GPUs with 4 rows each
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=39, e_scale=0.1),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=500),
    remat="dots_with_no_batch_dims_saveable",
    micro_batches=2,
    mesh=MeshConfig(data=-1, fsdp=16),  # 64 devices, as in v5p:4x4x4
    checkpoints=CheckpointConfig(every=1_000),
)
