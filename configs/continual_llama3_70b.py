"""Llama-3 70B, continual pretraining with the paper's settings for Llama-2 13B (its section 5.1).

    python train.py --config configs/continual_llama3_70b.py --workdir runs/continual_llama3_70b \
        --init-from models/llama3-70b --data.paths 'corpus/*.txt' --data.tokenizer models/llama3-70b

The paper has no 70B model: rate, weights and curriculum are those of its 13B. Learning rate, batch,
context and schedule are ours. The mesh is for 256 devices, such as v5p:4x8x8.
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
    model=LlamaConfig.llama3_8b(
        hidden_size=8_192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
    ),
    init_from="models/llama3-70b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama3-70b"),
    num_steps=200_000,
    batch_size=512,
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=79, e_scale=0.1),
    optimizer=OptimizerConfig(learning_rate=1.5e-5, warmup_steps=500),
    remat="attention",
    mesh=MeshConfig(data=-1, fsdp=64),
    checkpoints=CheckpointConfig(every=500),
)
