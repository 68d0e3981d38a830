"""LayerDrop (Fan et al., 2020, arXiv 1909.11556): every layer is dropped for entire batches at the
same rate. The trained model can then be pruned, for example to every other layer.

    python train.py --config configs/layerdrop.py --workdir runs/layerdrop \
        --init-from models/llama2-7b --data.paths 'corpus/*.txt'

The rate is the paper's. The paper trains from scratch; this configuration continues from a
checkpoint. A dropped layer costs nothing, so expect steps about a fifth shorter.
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
    model=LlamaConfig.llama2_7b(),
    init_from="models/llama2-7b",
    data=DataConfig(source="text", paths=("corpus/*.txt",), tokenizer="models/llama2-7b"),
    num_steps=10_000,
    batch_size=128,
    seq_len=4_096,
    layer_dropout=LayerDropoutConfig(p_max=0.2, distribution="uniform", skip="batch"),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=16),
)
