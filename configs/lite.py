"""LITE (Varshney et al., 2023, arXiv 2310.18581): equal losses at a fixed set of exits, no layer
dropout.

    python train.py --config configs/lite.py --workdir runs/lite --init-from models/llama2-7b \
        --data.source jsonl --data.paths instructions.jsonl \
        --data.prompt-template '{prompt}' --data.response-template '{response}'

The exits are the paper's for Llama-2 7B; steps and learning rate are ours. Expect usable middle
exits, and a final loss close to that of plain finetuning.
"""

from lsjax.config import (
    DataConfig,
    EarlyExitConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    model=LlamaConfig.llama2_7b(),
    init_from="models/llama2-7b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama2-7b"),
    num_steps=10_000,
    batch_size=128,
    seq_len=4_096,
    early_exit=EarlyExitConfig(
        curriculum="subset", exits=(8, 12, 16, 20, 24, 28), weights="uniform"
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=16),
)
