"""A small deep Llama learns to write Python, with LayerSkip, from the standard library's source.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

Needs no data but what comes with Python. Five minutes as `make quickstart` runs it, with a device
for each of 2 cores; held-out loss 2.30, and exits 4 and 8 agree with the last one at 0.79 and 0.83
of the tokens (0.28 and 0.47 without LayerSkip: docs/results.md). Exits 2 and 4 alone have a loss
beside the last one, as they are to draft, and all count alike: the paper's weights, which grow with
the square of the layer, leave the first exits of so short a training behind. So short a training
also needs new weights as large as these, and a start close to the embeddings.
"""

from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EarlyExitConfig,
    EvaluationConfig,
    LayerDropoutConfig,
    LlamaConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    model=LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=704,
        num_layers=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_context=512,
        tie_embeddings=True,
        init_std=0.05,
        scaled_init=True,
    ),
    data=DataConfig(vocab_size=384),
    num_steps=800,
    batch_size=4,
    seq_len=128,
    layer_dropout=LayerDropoutConfig(distribution="linear", p_max=0.3),
    early_exit=EarlyExitConfig(curriculum="subset", exits=(2, 4), weights="uniform"),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=60),
    checkpoints=CheckpointConfig(every=400),
    evaluation=EvaluationConfig(every=400, batches=32, num_draft_tokens=5, num_prompts=16),
)
