"""SmolLM2-135M, finetuned on TOPv2, from an utterance to its semantic parse: the paper's section
5.4 on a model that fits anywhere.

    python scripts/get_smollm2.py models/SmolLM2-135M-Instruct.Q4_1.gguf
    python train.py --config configs/finetune_topv2_smollm2.py --workdir runs/topv2

For two CPU cores: three passes over 2,993 rows in packed rows of 192 tokens, an hour of both. Its
head weighs as much as 8 of its 30 layers, so only the exits at a quarter, a half and three quarters
of them are trained, on half of the tokens, and the last one counts as much as these together. On
an accelerator take `--early-exit.token-share 1 --num-steps 1000`. Files as in
configs/finetune_topv2.py; docs/results.md says what to expect.
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

EXITS = (8, 15, 23)

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
    num_steps=280,
    batch_size=8,
    seq_len=192,
    layer_dropout=LayerDropoutConfig(p_max=0.1),
    early_exit=EarlyExitConfig(
        curriculum="subset",
        exits=EXITS,
        weights="custom",
        custom_weights=tuple(3.0 if exit == 30 else float(exit in EXITS) for exit in range(1, 31)),
        token_share=0.5,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20),
    checkpoints=CheckpointConfig(every=70),
    evaluation=EvaluationConfig(every=70, batches=8, exit_layer=8),
)
