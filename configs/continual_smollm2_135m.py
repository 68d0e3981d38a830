"""SmolLM2-135M, continual pretraining: the paper's recipe for Llama-3.2 1B on a small model.

    python scripts/get_smollm2.py models/SmolLM2-135M-Instruct.Q4_1.gguf
    python train.py --config configs/continual_smollm2_135m.py --workdir runs/smollm2 \
        --data.paths 'corpus/*.txt'

The head costs as much as 8 of the 30 layers, so intermediate exits learn from a quarter of all
tokens. Steps and learning rate are ours, for one accelerator. In bfloat16, two Xeon cores with AMX
take 14 to 17 minutes for 260 steps of 4 x 192 tokens. Exit 8 then agrees with the last exit at 0.37
of the held-out tokens (docs/results.md has the flags).
"""

from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    model=LlamaConfig.smollm2_135m(),
    init_from="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    data=DataConfig(
        source="text",
        paths=("corpus/*.txt",),
        tokenizer="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    num_steps=4_000,
    batch_size=64,
    seq_len=1_024,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.1, token_share=0.25),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=200),
    checkpoints=CheckpointConfig(every=500),
)
