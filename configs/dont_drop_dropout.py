""""Don't Drop Dropout" (Elhoushi et al., 2026, arXiv 2609.05275): from scratch with layer dropout
alone. Rates rise towards the last layer and fall with time. Kept blocks are scaled by 1 / (1 - p).

    python train.py --config configs/dont_drop_dropout.py --workdir runs/dont_drop_dropout \
        --data.paths 'corpus/*.txt' --data.tokenizer tokenizers/llama3

Shape and rate are near its 1.8B run (p_max 0.6); the learning rate is ours. On average, a quarter
of p_max is the share of dropped blocks. `--layer-dropout.skip gather` can save that share of the
layers' computation (docs/training.md has measurements).
"""

from lsjax.config import (
    DataConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    model=LlamaConfig.layerskip_1_5b(vocab_size=128_256),
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="tokenizers/llama3"),
    num_steps=70_000,
    batch_size=256,
    seq_len=2_048,
    layer_dropout=LayerDropoutConfig(
        p_max=0.6, distribution="linear", schedule="decreasing", rescale=True
    ),
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2_000),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=8),
)
