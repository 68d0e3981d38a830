"""Progressive layer dropping (Zhang and He, 2020, arXiv 2010.13369): rates rise towards the last
layer, up to one half. They also rise with time, quickly at first.

    python train.py --config configs/pld.py --workdir runs/pld \
        --init-from models/llama2-7b --data.paths 'corpus/*.txt'

This differs from the paper in three ways. One draw drops an entire block; the paper gates attention
and feed-forward separately. D(l) is l / (L - 1), not l / L: the first layer is never dropped, and
the last one has the full rate. Training continues from a checkpoint; the paper trains from scratch.
A dropped block costs nothing, so expect steps about a quarter shorter once the rates have risen.
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
    layer_dropout=LayerDropoutConfig(
        p_max=0.5, distribution="linear", schedule="saturating", skip="batch", rescale=True
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
    remat="dots_with_no_batch_dims_saveable",
    mesh=MeshConfig(data=-1, fsdp=16),
)
