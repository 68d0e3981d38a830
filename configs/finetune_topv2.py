r"""Llama 1.5B, finetuned on TOPv2, from an utterance to its semantic parse (the paper's section
5.4, Tables 8 and 10).

    python train.py --config configs/finetune_topv2.py --workdir runs/finetune_topv2 \
        --init-from runs/from_scratch_1_5b --data.paths topv2/train.tsv \
        --data.validation-paths topv2/validation.tsv

Rates, weights, curriculum, learning rate, batch and steps are the paper's; context, warm-up and the
rest of AdamW are ours. Each row is one example with its own layer dropout, so a step sees the
paper's 256 samples. The files are tab-separated, with Hinglish-TOP's columns en_query and en_parse.
For TOPv2's own files, add `--data.prompt-template $'{utterance}\n' --data.response-template
'{semantic_parse}'`. Expected from the paper: 82.9% exact match (85.9% without LayerSkip). Exit 6
with 8 drafts accepts 76% and decodes 2.0 times as fast.
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
    model=LlamaConfig.layerskip_1_5b(),
    init_from="runs/from_scratch_1_5b",
    data=DataConfig(
        source="tsv",
        paths=("topv2/train.tsv",),
        validation_paths=("topv2/validation.tsv",),
        prompt_template="{en_query}\n",
        response_template="{en_parse}",
        tokenizer="runs/from_scratch_1_5b",
        packing=False,
    ),
    num_steps=5_800,
    batch_size=256,  # 8 GPUs with 32 rows each
    seq_len=256,
    layer_dropout=LayerDropoutConfig(p_max=0.2),
    early_exit=EarlyExitConfig(curriculum="gradual", e_scale=1.0),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
    mesh=MeshConfig(data=-1, fsdp=8),  # 8 devices, as in v5p:2x2x2
    checkpoints=CheckpointConfig(every=500),
)
