"""A run that takes seconds, for the drills of docs/pods.md; its tokens are bytes of Python."""

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
    model=LlamaConfig.tiny(num_layers=3, hidden_size=32, intermediate_size=64, head_dim=8),
    data=DataConfig(tokenizer="bytes", max_documents=20, validation_fraction=0.2),
    num_steps=200,
    batch_size=16,
    seq_len=32,
    layer_dropout=LayerDropoutConfig(p_max=0.5, distribution="linear"),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, weights="uniform"),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    checkpoints=CheckpointConfig(every=5, keep_last=3),
    evaluation=EvaluationConfig(every=100, batches=1, sample_tokens=0),
)
