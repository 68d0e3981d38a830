"""SmolLM2-135M, finetuned on TOPv2, from an utterance to its semantic parse: the paper's section
5.4 on a small model.

    python scripts/get_smollm2.py models/SmolLM2-135M-Instruct.Q4_1.gguf
    python train.py --config configs/finetune_topv2_smollm2.py --workdir runs/topv2

Sized for two CPU cores: 4.4 passes over 2,993 examples, packed into rows of 192 tokens. With
`--dtype bfloat16` it takes 41 minutes with AMX, or 85 on a single core with AVX-512's bfloat16. The
head costs as much as 8 of the 30 layers. So only the exits at a quarter, a half and three quarters
of the depth are trained. They use half of the tokens. The first of them drafts, so it and the last
exit weigh more. On an accelerator, use `--early-exit.token-share 1 --num-steps 1000`. Files are
those of configs/finetune_topv2.py; docs/results.md has the results.
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

WEIGHTS = {8: 2.0, 15: 1.0, 23: 1.0, 30: 3.0}

config = TrainConfig(
    model=LlamaConfig.smollm2_135m(),
    init_from="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    data=DataConfig(
        source="tsv",
        paths=("topv2/train.tsv",),
        validation_paths=("topv2/validation.tsv",),
        prompt_template="{en_query}\n",
        response_template="{en_parse}",
        tokenizer="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    num_steps=800,
    batch_size=4,
    seq_len=192,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(
        curriculum="subset",
        exits=tuple(WEIGHTS)[:-1],
        weights="custom",
        custom_weights=tuple(WEIGHTS.get(exit, 0.0) for exit in range(1, 31)),
        token_share=0.5,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=30),
    checkpoints=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=400, batches=8, exit_layer=8),
)
