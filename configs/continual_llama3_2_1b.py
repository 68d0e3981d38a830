"""Llama-3.2 1B, continual pretraining on 839B tokens (the paper's section 5.1, Tables 8 and 10).

    python train.py --config configs/continual_llama3_2_1b.py --workdir runs/continual_llama3_2_1b \
        --init-from models/llama3.2-1b --data.paths 'corpus/*.txt' \
        --data.tokenizer models/llama3.2-1b

Rate, weights, curriculum and number of tokens are the paper's. It does not give learning rate,
batch, context and schedule, so those are ours. The head costs as much as 4.3 layers here.
`--early-exit.token-share 0.25` quarters the cost of the exits' losses, with the same expectation.
Expected from the paper (its Table 2): a perplexity on Wikipedia of 22.1 at exit 8 (2.18e5 without
LayerSkip) and of 8.38 at the last exit (8.52). The last exit loses 6 points on MMLU, 9 on HumanEval
and 13 on MBPP.
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
    model=LlamaConfig.llama3_2_1b(),
    init_from="models/llama3.2-1b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama3.2-1b"),
    num_steps=400_000,
    batch_size=256,
    seq_len=8_192,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=8, e_scale=0.1),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=500),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=16),  # 64 devices, as in v5p:4x4x4
    checkpoints=CheckpointConfig(every=1_000),
)
