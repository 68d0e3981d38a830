"""A small deep Llama, trained with LayerSkip to write Python on the standard library's source.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

It needs only data that comes with Python. `make quickstart` runs it in minutes on 2 cores, each as
one device. Expect a held-out loss of 3.43 nats a token, 1.38 a byte (3.95 without LayerSkip). Exit
1 agrees with the last exit at 0.58 of the tokens (docs/results.md has three seeds). Besides the
last exit, only exits 1, 2 and 4 have a loss, because they draft.
All weigh the same: the paper's weights grow with the square of the layer, so short training would
leave the first exits behind. Short training also needs large initial weights (`init_std`) and small
first residual updates (`scaled_init`).
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
        vocab_size=1_024,
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
    data=DataConfig(vocab_size=1_024),
    num_steps=800,
    batch_size=4,
    seq_len=128,
    layer_dropout=LayerDropoutConfig(distribution="linear", p_max=0.3),
    early_exit=EarlyExitConfig(curriculum="subset", exits=(1, 2, 4), weights="uniform"),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=60),
    checkpoints=CheckpointConfig(every=400),
    evaluation=EvaluationConfig(every=400, batches=32, num_draft_tokens=5, num_prompts=16),
)
