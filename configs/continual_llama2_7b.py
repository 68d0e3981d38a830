"""Llama-2 7B, continual pretraining on 52B tokens (the paper's section 5.1, Tables 8 and 10).

    python train.py --config configs/continual_llama2_7b.py --workdir runs/continual_llama2_7b \
        --init-from models/llama2-7b --data.paths 'corpus/*.txt' --data.tokenizer models/llama2-7b

Rates, weights, curriculum, learning rate, batch, steps and context are the paper's. It does not
give warm-up, decay and the rest of AdamW, so those are ours. Expected from the paper: exit 8 with
12 drafts accepts 69% on CNN/DM and decodes 1.86 times as fast.
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
    model=LlamaConfig.llama2_7b(),
    init_from="models/llama2-7b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama2-7b"),
    num_steps=50_000,
    batch_size=256,  # 64 GPUs with 4 rows each
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.2),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=16),  # 64 devices, as in v5p:4x4x4
    checkpoints=CheckpointConfig(every=1_000),
)
