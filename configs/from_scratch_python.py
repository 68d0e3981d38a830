"""A small deep Llama, trained with LayerSkip on the bytes of the standard library's source. The
recipe is ours (linear dropout, two exits), sized for two CPU cores.

    python train.py --config configs/from_scratch_python.py --workdir runs/python

It has 25 million parameters and needs only data that comes with Python. Expect an hour on 2 cores
for 3.5 million bytes; with AMX or AMD's AVX-512, add `--dtype bfloat16`. A run of 355 steps took 15
minutes. Its held-out loss is 1.70 nats a byte, and exit 4 agrees with the last exit at 0.86 of the
bytes (docs/results.md). Besides the last exit, only exits 2 and 4 have a loss, because they draft.
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
        vocab_size=258,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=16,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        max_context=1024,
        tie_embeddings=True,
        init_std=0.05,
        scaled_init=True,
    ),
    data=DataConfig(tokenizer="bytes"),
    num_steps=1_700,
    batch_size=8,
    seq_len=256,
    layer_dropout=LayerDropoutConfig(distribution="linear", p_max=0.3),
    early_exit=EarlyExitConfig(curriculum="subset", exits=(2, 4), weights="uniform"),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
    checkpoints=CheckpointConfig(every=200),
    evaluation=EvaluationConfig(
        every=425, batches=32, exit_layer=4, num_prompts=24, prompt_tokens=128
    ),
)
