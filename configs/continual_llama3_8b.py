"""Llama-3 8B, continual pretraining on 419B tokens (the paper's section 5.1, Tables 8 and 10).

    python train.py --config configs/continual_llama3_8b.py --workdir runs/continual_llama3_8b \
        --init-from models/llama3-8b --data.paths 'corpus/*.txt' --data.tokenizer models/llama3-8b

Rate, weights, curriculum and number of tokens are the paper's. It does not give learning rate,
batch, context and schedule, so those are ours. The head costs as much as 2.4 layers here.
`--early-exit.token-share 0.25` quarters the cost of the exits' losses, with the same expectation.
Expected from the paper (its Table 2): a perplexity on Wikipedia of 12.2 at exit 16 (1.1e5 without
LayerSkip) and of 5.38 at the last exit (5.63). The last exit loses 6 points on MMLU and 9 on each
of GSM8K, HumanEval and MBPP.
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
    model=LlamaConfig.llama3_8b(),
    init_from="models/llama3-8b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama3-8b"),
    num_steps=200_000,
    batch_size=256,
    seq_len=8_192,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.1),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
    remat="dots_with_no_batch_dims_saveable",
    micro_batches=2,
    mesh=MeshConfig(data=-1, fsdp=16),  # 64 devices, as in v5p:4x4x4
    checkpoints=CheckpointConfig(every=1_000),
)
